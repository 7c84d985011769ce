"""Norms of a step: limits on their growth, and what a refresh criterion watches."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from optimizers.interfaces import AllReduce, MatrixBatch, Steps
from optimizers.rules.parts.subspaces import moment_is_split


def limits_growth(options: Mapping[str, Any], target: str) -> bool:
    """Return True if `norm_growth_limit` bounds this target: "factor", "residual" or "total"."""
    if options["norm_growth_limit"] is None or options["norm_growth_target"] != target:
        return False
    return target != "residual" or bool(options["residual_scale"])


def limits_whole_update(options: Mapping[str, Any]) -> bool:
    """Return True if a limiter needs the residual Gᵣ = ρ(G - QQᵀG) or the whole update as a matrix."""
    is_formed = options["gradient_scaling"] == "none" and options["residual"] in ("drop", "sgd")
    return is_formed and (limits_growth(options, "residual") or limits_growth(options, "total"))


def limit_growth(b: MatrixBatch, target: str, matrices: Tensor) -> Steps[Tensor]:
    """Scale matrices so that ‖·‖_F grows at most by γ a step, where the options limit this target."""
    if not limits_growth(b.options, target):
        return matrices
    is_split = moment_is_split(b) if target == "factor" else b.split is not None
    norm = yield from frobenius_norm(matrices, is_split)
    return matrices * growth_factor(b, norm)[:, None, None]


def growth_factor(b: MatrixBatch, norm: Tensor) -> Tensor:
    """Return the factor (b,) that keeps a norm (b,) below γ times the last one, and remember what is left of it.

    A last norm of 0 limits nothing.
    """
    last = b.state["previous_norm"]
    limit = b.options["norm_growth_limit"] * last
    shrink = torch.where((last > 0) & (norm > limit), limit / norm, 1.0)
    b.commit("previous_norm", norm * shrink)
    return shrink


def record_projected_norm(b: MatrixBatch, gradient: Tensor) -> Steps[None]:
    """Store ‖Ĝ‖ where `refresh_threshold` watches it: at or below the threshold the next step renews the basis."""
    if b.options["refresh_threshold"] is not None:
        b.commit("projected_norm", (yield from frobenius_norm(gradient, moment_is_split(b))))


def frobenius_norm(matrices: Tensor, is_split: bool) -> Steps[Tensor]:
    """Return Frobenius norms (b,) of matrices, or of those that this process holds a part of; squares in fp64."""
    square = yield AllReduce(matrices.double().square().sum((-2, -1)), is_split)
    return square.sqrt().to(matrices.dtype)
