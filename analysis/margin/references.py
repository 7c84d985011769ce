"""The reference descents as a torch optimizer, for networks with more than one matrix."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

import optimizers
from analysis.margin.chosen import Chosen
from harness.config.errors import InputError
from optimizers.linalg.precision import full_precision

KINDS = ("gd", "ngd", "sign", "spectral")


class Reference(torch.optim.Optimizer):
    """Steepest descent of unit size, or plain gradient descent.

    Args:
        params: parameters.
        lr: step size.
        kind: "gd"; "ngd" (unit length over all parameters); "sign"; "spectral" (the exact polar factor of each
            matrix, and the unit vector of each vector).
    """

    def __init__(self, params: Iterable[Tensor], lr: float, kind: str) -> None:
        if kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
        self.kind = kind
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One step."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        pairs = [(p, p.grad, g["lr"]) for g in self.param_groups for p in g["params"] if p.grad is not None]
        total = torch.sqrt(sum((grad.square().sum() for _, grad, _ in pairs), torch.zeros(())))
        for parameter, grad, lr in pairs:
            parameter.sub_(lr * self._direction(grad, total))
        return loss

    def _direction(self, grad: Tensor, total: Tensor) -> Tensor:
        if self.kind == "gd":
            return grad
        if self.kind == "ngd":
            return grad / total.clamp_min(torch.finfo(grad.dtype).tiny)
        if self.kind == "sign":
            return grad.sign()
        if grad.ndim == 2:
            with full_precision(grad.device.type):
                return optimizers.polar(grad, "svd").factor
        # A vector is a matrix of one column: its polar factor is the unit vector.
        return grad / torch.linalg.vector_norm(grad).clamp_min(torch.finfo(grad.dtype).tiny)


def build(model: torch.nn.Module, chosen: Chosen) -> torch.optim.Optimizer:
    """The optimizer of a network: a reference, or a class of `optimizers` routed by module type.

    Raises:
        InputError: options that don't fit the model.
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    if chosen.preset is None:
        return Reference(trainable, chosen.lr, chosen.name)
    options = {key: value for key, value in chosen.options.items() if key != "lr"}
    try:
        return optimizers.build(chosen.preset, model.named_parameters(), lr=chosen.lr, **options)
    except (optimizers.OptionError, TypeError, ValueError) as error:
        raise InputError(f"optimizer {chosen.name}", "", f"cannot be built: {error}") from None
