"""Build the optimizer that a configuration names, over the parameters of a model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

import optimizers
from harness.config.schema import RunConfig
from harness.errors import InputError
from harness.tracked_optimizer import tracked
from optimizers.shard_axes import preferred_axes

if TYPE_CHECKING:
    from harness.protocols import Engine


def build_optimizer(config: RunConfig, model: nn.Module, engine: Engine) -> torch.optim.Optimizer:
    """Build the preset or plug-in that ``config.optimizer`` names, routed over the parameters of ``model``.

    Args:
        config: checked.
        model: as `Engine.shard` left it: whole parameters, or DTensors, which the optimizer recognizes.
        engine: gives the process group and the layout.

    Raises:
        InputError: an option that this model or plug-in refuses.
    """
    section = config.optimizer
    if section.target is not None:
        return _plugin(section.target, model, {"lr": section.lr, **section.options})
    try:
        return optimizers.build(
            section.name,
            model.named_parameters(),
            modules=model,
            process_group=engine.process_group(),
            # Whole parameters then only tell shapes and routes; DeepSpeed's slices are bound to it later.
            layout="partitioned" if engine.layout == "partitioned" else None,
            work=config.engine.optimizer_work,
            lr=section.lr,
            **section.options,
        )
    except optimizers.OptionError as error:
        raise _refused(error) from error


def shard_axes(config: RunConfig, model: nn.Module, shards: int) -> dict[str, int]:
    """Return parameter → axis to shard it along: where the optimizer sends least, or ``engine.shard_axis``.

    Args:
        config: checked.
        model: whole.
        shards: processes over which one replica of the weights is sharded.

    Raises:
        InputError: an option that this model refuses.
    """
    section, axis = config.optimizer, config.engine.shard_axis
    # A plug-in's traffic is not known; most gather what they need, which costs the same along either axis.
    if axis != "auto" or section.target is not None:
        return {name: 0 if axis == "auto" else axis for name, _ in model.named_parameters()}
    try:
        return preferred_axes(
            section.name,
            model.named_parameters(),
            shards,
            modules=model,
            lr=section.lr,
            **section.options,
        )
    except optimizers.OptionError as error:
        raise _refused(error) from error


def _refused(error: optimizers.OptionError) -> InputError:
    return InputError(
        f"optimizer.{error.key}",
        error.value,
        error.reason,
        allowed=error.allowed,
        suggestion=error.suggestion,
    )


def ownership(optimizer: torch.optim.Optimizer, model: nn.Module) -> list[dict[str, Any]]:
    """Return which parameter took which rule, for parameters.json; a plug-in takes all of them."""
    routes = tracked(optimizer).routes
    if not routes:
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
