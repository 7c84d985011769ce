"""Fit recorded updates by a direction: how long it is, how much the weights decay, and what is left unexplained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

FLOOR = 1e-5
"""Relative error of an fp32 update that nothing else explains."""


@dataclass(frozen=True)
class Fit:
    """ΔW_t = -η_t s_t D_t - η_t λ W_t, least squares.

    Attributes:
        scales: s_t of each update whose direction is not zero.
        decay: λ; its standard error.
        residual: root mean square over updates of the unexplained part, relative to ‖ΔW_t‖.
    """

    scales: tuple[float, ...]
    decay: float
    decay_error: float
    residual: float

    @property
    def scale(self) -> float:
        """Return the mean of the scales."""
        return sum(self.scales) / len(self.scales) if self.scales else 0.0

    @property
    def spread(self) -> float:
        """Return (largest - smallest scale) / mean."""
        return (max(self.scales) - min(self.scales)) / abs(self.scale) if self.scale else 0.0


def fit(
    changes: Sequence[Tensor], directions: Sequence[Tensor], weights: Sequence[Tensor], rates: Sequence[float]
) -> Fit:
    """Fit one scale per update and one decay over all.

    Args:
        changes: ΔW_t, not zero.
        directions: D_t.
        weights: W_t before the update.
        rates: η_t, not zero.

    Returns:
        The fit; an update with a direction of zero has no scale.
    """
    sizes = [max(float(c.norm()), 1e-300) for c in changes]
    # Eliminate each s_t: project ΔW_t and η_t W_t on what is orthogonal to D_t; λ is what remains.
    top = bottom = 0.0
    parts = []
    for change, direction, weight, rate, size in zip(changes, directions, weights, rates, sizes):
        d, w, c = direction / max(float(direction.norm()), 1e-300), weight * (rate / size), change / size
        dc, dw = float((d * c).sum()), float((d * w).sum())
        c_left, w_left = c - dc * d, w - dw * d
        top -= float((c_left * w_left).sum())
        bottom += float((w_left * w_left).sum())
        parts.append((c_left, w_left, dc, dw, rate, size, float(direction.norm())))
    decay = top / bottom if bottom > 0 else 0.0
    scales, unexplained, count = [], 0.0, 0
    for c_left, w_left, dc, dw, rate, size, length in parts:
        unexplained += float((c_left + decay * w_left).square().sum())
        count += c_left.numel()
        if length > 0:
            scales.append(-(dc + decay * dw) * size / (rate * length))
    error = (unexplained / max(count - len(parts) - 1, 1) / bottom) ** 0.5 if bottom > 0 else float("inf")
    return Fit(tuple(scales), decay, error, (unexplained / len(parts)) ** 0.5)


def rounding_of(weights: Sequence[Tensor], changes: Sequence[Tensor]) -> float:
    """Return how much of the updates the rounding of the weights may be, relative, root mean square.

    Storing a weight w rounds it by up to half a unit in the last place, with variance ulp²/12.

    Args:
        weights: before each update, in the dtype of the training.
        changes: ΔW_t.
    """
    total = 0.0
    for weight, change in zip(weights, changes):
        if not weight.is_floating_point():
            continue
        exponent = torch.frexp(weight.float().abs()).exponent.double() - 1
        ulp = torch.exp2(exponent) * torch.finfo(weight.dtype).eps
        ulp = torch.where(weight == 0, 0.0, ulp)
        total += float(ulp.square().sum()) / 12 / max(float(change.double().square().sum()), 1e-300)
    return (total / max(len(changes), 1)) ** 0.5
