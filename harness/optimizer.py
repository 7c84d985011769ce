"""From the optimizer group of the configuration to an optimizer over the model's parameters."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import optimizers
from harness.config.errors import InputError
from harness.config.schema import RunConfig


def build_optimizer(config: RunConfig, model: nn.Module, process_group: Any) -> torch.optim.Optimizer:
    """The preset or plug-in that ``config.optimizer`` names, routed over the parameters of ``model``.

    Raises:
        InputError: an option that this model or plug-in refuses.
    """
    chosen = config.optimizer
    if chosen.target is not None:
        return _plugin(chosen.target, model, {"lr": chosen.lr, **chosen.options})
    try:
        return optimizers.build(
            chosen.name,
            model.named_parameters(),
            modules=model,
            process_group=process_group,
            lr=chosen.lr,
            **chosen.options,
        )
    except optimizers.OptionError as error:
        raise InputError(
            f"optimizer.{error.key}",
            error.value,
            error.reason,
            allowed=error.allowed,
            suggestion=error.suggestion,
        ) from error


def ownership(optimizer: torch.optim.Optimizer, model: nn.Module) -> list[dict[str, Any]]:
    """Which parameter took which rule, for parameters.json. A plug-in owns all of them."""
    routes = getattr(optimizer, "routes", None)
    if routes is None:
        rule = type(optimizer).__name__
        return [
            {"name": name, "shape": list(p.shape), "numel": p.numel(), "rule": rule, "reason": "plug-in"}
            for name, p in model.named_parameters()
            if p.requires_grad
        ]
    return [
        {"name": r.name, "shape": list(r.shape), "numel": r.numel, "rule": r.rule, "reason": r.reason}
        for r in routes
    ]


def _plugin(target: str, model: nn.Module, options: dict[str, Any]) -> torch.optim.Optimizer:
    try:
        kind = optimizers.plugin(target)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise InputError(
            "optimizer.target",
            target,
            f"cannot be used: {error}",
            allowed="package.module.Class of a torch.optim.Optimizer",
        ) from error
    try:
        return kind([p for p in model.parameters() if p.requires_grad], **options)
    except (TypeError, ValueError) as error:
        raise InputError(
            "optimizer",
            target,
            f"refuses its options {options}: {error}",
            allowed="its constructor's arguments",
        ) from error
