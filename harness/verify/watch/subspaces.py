"""Ranks of an update and of the slices that processes hold: were they projected on one subspace, or each on its own?"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

NOISE = 3.0
"""Singular values below so many times the norm of the rounding are no part of the rank."""
_LEAST = 1e-4
"""The same, relative to the norm of the update, for what computing the update rounds."""


@dataclass(frozen=True)
class ShardRanks:
    """Numerical ranks of an update.

    Attributes:
        slices: of each rank's slice that moves.
        whole: of the matrix.
        limits: the largest that each slice could have.
    """

    slices: tuple[int, ...]
    whole: int
    limits: tuple[int, ...]

    @property
    def has_own_subspaces(self) -> bool:
        """Return True if every slice is of low rank, and together they span more than the largest of them.

        A projection on one subspace leaves a matrix of its rank, whose slices have no more.
        """
        is_low = all(rank < limit for rank, limit in zip(self.slices, self.limits))
        return len(self.slices) > 1 and is_low and self.whole > max(self.slices)


def shard_ranks(change: Tensor, shards: tuple[int, int], rounding: float) -> ShardRanks | None:
    """Return the ranks of one update; None where nothing is sharded, or nothing moves.

    Args:
        change: ΔW (m, n) without weight decay, which would be of full rank.
        shards: axis and number of the slices.
        rounding: of the weights, relative to the norm of the change.
    """
    axis, count = shards
    if count < 2 or change.ndim != 2:
        return None
    # Rows of tokens that no batch held limit the rank of a slice, whatever the rule.
    parts = [_moving(part) for part in change.chunk(count, axis)]
    parts = [part for part in parts if part.numel()]
    if not parts:
        return None
    noise = max(NOISE * rounding, _LEAST) * float(change.norm())
    return ShardRanks(
        tuple(_rank(part, noise) for part in parts),
        _rank(change, noise),
        tuple(min(part.shape) for part in parts),
    )


def _moving(part: Tensor) -> Tensor:
    """Return a matrix without rows and columns of zeros."""
    moves = part != 0
    return part[moves.any(1)][:, moves.any(0)]


def _rank(matrix: Tensor, noise: float) -> int:
    return int((torch.linalg.svdvals(matrix) > noise).sum())
