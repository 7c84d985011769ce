"""Give updates a size: a root mean square (`update_rms`), or the norm of their matrix (`weight_norm=hyperball`).

It runs as a part of the rule, so that norms of sharded updates are summed in the collective of one phase.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from optimizers.interfaces import InTurn, LowRank, MatrixBatch, Steps, Update
from optimizers.linalg.requests import AllReduce


def sets_size(options: Mapping[str, Any]) -> bool:
    """Return True if these options decide how large an update is."""
    return options.get("update_rms") is not None or options.get("weight_norm") == "hyperball"


def keeps_factors(keep: float, options: Mapping[str, Any]) -> bool:
    """Return True if an update keep·G + left·right still is of this form after `resized`."""
    return keep == 0.0 or not sets_size(options)


def resized(b: MatrixBatch, update: Update) -> Steps[Update]:
    """Scale each update to the norm that the options ask for: update_rms·√(mn), or the norm R of its weight.

    An update of zeros stays one. Factors without a part of the gradient stay factors; others are formed, one batch
    after the other.
    """
    if isinstance(update.delta, LowRank) and isinstance(update.delta.keep, Tensor):
        yield InTurn()
        update = update._replace(delta=update.delta.dense(b))
    square = yield AllReduce(_square(b, update.delta), b.split is not None)
    if b.radii is None:
        m, n = b.shape
        target: Tensor | float = b.options["update_rms"] * math.sqrt(m * n)
    else:
        target = b.radii
    factor = torch.where(square > 0, target / square.sqrt(), 0.0)
    if b.radii is not None:
        # A weight that starts as zeros has no norm to keep: its update stays as it is.
        factor = torch.where(b.radii > 0, factor, 1.0)
    factor = factor.to(b.dtype)[:, None, None]
    delta = update.delta
    if isinstance(delta, LowRank) and delta.keep == 0.0:
        return update._replace(delta=LowRank(delta.left, delta.right * factor))
    if isinstance(delta, LowRank):
        yield InTurn()
        return update._replace(delta=delta.dense(b).mul_(factor))
    return update._replace(delta=delta * factor)


def _square(b: MatrixBatch, delta: Tensor | LowRank) -> Tensor:
    """Return ‖Δ‖²_F of this process' part of each update, (b,) fp64.

    Of factors without forming them: ‖kG + LR‖² = k²‖G‖² + 2k⟨LᵀG, R⟩ + ⟨LᵀL, RRᵀ⟩, which also holds for a part of the
    rows of L and G, or of the columns of R and G.
    """
    if isinstance(delta, Tensor):
        return torch.linalg.vector_norm(delta, dim=(-2, -1), dtype=torch.float64).square()
    left, right = delta.left.double(), delta.right.double()
    square = ((left.mT @ left) * (right @ right.mT)).sum((-2, -1))
    assert not isinstance(delta.keep, Tensor)  # see `resized`
    if delta.keep:
        gradient = b.gradient
        norms = torch.linalg.vector_norm(gradient, dim=(-2, -1), dtype=torch.float64)
        cross = ((delta.left.mT @ gradient).double() * right).sum((-2, -1))
        square = square + delta.keep**2 * norms.square() + 2.0 * delta.keep * cross
    return square.clamp_min_(0.0)
