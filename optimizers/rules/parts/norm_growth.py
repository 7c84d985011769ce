"""Bound how fast a norm grows from step to step, and record the norm that the residual criterion watches."""

from __future__ import annotations

import torch
from torch import Tensor

from optimizers.interfaces import AllReduce, MatrixBatch, Steps
from optimizers.rules.parts.low_rank import limits_growth
from optimizers.rules.parts.subspace import moment_is_split


def limit_growth(b: MatrixBatch, target: str, matrices: Tensor) -> Steps[Tensor]:
    """Scale matrices so that ‖·‖_F grows at most by γ a step, where the options limit this target.

    A last norm of 0 limits nothing.
    """
    if not limits_growth(b.options, target):
        return matrices
    is_split = moment_is_split(b) if target == "factor" else b.split is not None
    norm = yield from frobenius_norm(matrices, is_split)
    last = b.state["previous_norm"]
    limit = b.options["norm_growth_limit"] * last
    shrink = torch.where((last > 0) & (norm > limit), limit / norm, 1.0)
    b.commit("previous_norm", norm * shrink)
    return matrices * shrink[:, None, None]


def record_projected_norm(b: MatrixBatch, gradient: Tensor) -> Steps[None]:
    """Store ‖Ĝ‖ where `refresh_threshold` watches it: at or below the threshold the next step renews the basis."""
    if b.options["refresh_threshold"] is not None:
        b.commit("projected_norm", (yield from frobenius_norm(gradient, moment_is_split(b))))


def frobenius_norm(matrices: Tensor, is_split: bool) -> Steps[Tensor]:
    """Return Frobenius norms (b,) of matrices, or of those that this process holds a part of; squares in fp64."""
    square = yield AllReduce(matrices.double().square().sum((-2, -1)), is_split)
    return square.sqrt().to(matrices.dtype)
