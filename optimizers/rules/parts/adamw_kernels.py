"""Steps of AdamW (`optimizers.rules.adamw`): torch's fused kernel, or fp32 moments for half-precision weights."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from optimizers.interfaces import compute_dtype
from optimizers.rounding import Rounding, compensated, rounded

FUSED_DEVICES = ("cpu", "cuda", "xpu", "mps")


def state_kinds(rounding: str, parameter: Tensor) -> dict[str, torch.dtype]:
    """Return kind → dtype of the state tensors, which have the parameter's shape."""
    wide = compute_dtype(parameter)
    kinds = {"moment": wide, "second_moment": wide}
    if rounding == "kahan" and parameter.dtype != wide:
        kinds["compensation"] = parameter.dtype
    return kinds


@dataclass(frozen=True)
class AdamWSettings:
    """Hyperparameters of one AdamW step."""

    lr: float | Tensor
    weight_decay: float
    betas: tuple[float, float]
    eps: float
    eps_form: str
    rounding: Rounding

    def eps_at(self, step: int) -> float:
        """Return ε for torch's form √v̂ + ε at the step-th step (from 1); raw: √v + ε is √v̂ + ε/√(1 - β₂ᵗ)."""
        return self.eps / math.sqrt(1.0 - self.betas[1] ** step) if self.eps_form == "raw" else self.eps


def step(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    states: Sequence[Mapping[str, Any]],
    settings: AdamWSettings,
    names: Sequence[str],
    found_inf: Tensor | None,
) -> None:
    """Step parameters that have gradients, in groups of equal device, dtype and step number.

    Args:
        parameters: to be changed, any shape.
        gradients: of each, of its shape.
        states: each with "moment", "second_moment" (and "compensation"), and "step" as it was before.
        names: of the parameters; the seed of stochastic rounding.
        found_inf: 1-element float tensor; above 0: nothing changes. None: not masked.
    """
    groups: dict[tuple[torch.device, torch.dtype, int], list[int]] = {}
    for i, (parameter, state) in enumerate(zip(parameters, states)):
        groups.setdefault((parameter.device, parameter.dtype, state["step"]), []).append(i)
    for (device, dtype, before), positions in groups.items():
        weights = [parameters[i] for i in positions]
        grads = [gradients[i] for i in positions]
        group_states = [states[i] for i in positions]
        mask = None if found_inf is None else (found_inf > 0).to(device=device, dtype=torch.float32)
        if dtype in (torch.float32, torch.float64) and device.type in FUSED_DEVICES:
            _fused(weights, grads, group_states, settings, before + 1, mask)
        else:
            _in_fp32(weights, grads, group_states, settings, before + 1, mask, [names[i] for i in positions])


def _fused(
    weights: list[Tensor],
    gradients: list[Tensor],
    states: list[Mapping[str, Any]],
    s: AdamWSettings,
    now: int,
    mask: Tensor | None,
) -> None:
    # The kernel reads the step number only, so one tensor serves all, and the count itself stays on the host.
    count = torch.full((), float(now), dtype=torch.float32, device=weights[0].device)
    torch._fused_adamw_(  # pyright: ignore[reportPrivateImportUsage]
        weights,
        gradients,
        [state["moment"] for state in states],
        [state["second_moment"] for state in states],
        [],
        [count] * len(weights),
        lr=s.lr,  # type: ignore[arg-type]
        beta1=s.betas[0],
        beta2=s.betas[1],
        weight_decay=s.weight_decay,
        eps=s.eps_at(now),
        amsgrad=False,
        maximize=False,
        grad_scale=None,
        found_inf=mask,
    )


def _in_fp32(
    weights: list[Tensor],
    gradients: list[Tensor],
    states: list[Mapping[str, Any]],
    s: AdamWSettings,
    now: int,
    mask: Tensor | None,
    names: list[str],
) -> None:
    """Step half-precision weights: fp32 moments and an fp32 update, which is rounded once."""
    bias1, bias2 = 1.0 - s.betas[0] ** now, math.sqrt(1.0 - s.betas[1] ** now)
    masked = None if mask is None else mask.reshape(()) > 0
    for weight, grad, state, name in zip(weights, gradients, states, names):
        moment, second = state["moment"], state["second_moment"]
        gradient = grad.to(moment.dtype)
        first = torch.lerp(moment, gradient, 1.0 - s.betas[0])
        squares = torch.addcmul(s.betas[1] * second, gradient, gradient, value=1.0 - s.betas[1])
        step_ = first / bias1 / (squares.sqrt() / bias2 + s.eps_at(now))
        wide = weight.to(moment.dtype)
        change = -s.lr * (step_ + s.weight_decay * wide)
        if s.rounding.mode == "kahan" and "compensation" in state:
            result, lost = compensated(weight, change, state["compensation"])
            _commit(state["compensation"], lost, masked)
        else:
            result = rounded(wide + change, weight.dtype, s.rounding, name, now)
        _commit(weight, result, masked)
        _commit(moment, first, masked)
        _commit(second, squares, masked)


def _commit(target: Tensor, value: Tensor, masked: Tensor | None) -> None:
    target.copy_(value if masked is None else torch.where(masked, target, value))
