"""Rows or columns of a batch of matrices that a step chooses (Dion2): which, their factor, and where it goes.

The chosen positions stay on the device; only their number, which the host knows, decides shapes.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from optimizers.interfaces import AllReduce, GatherPolar, MatrixBatch, Steps
from optimizers.linalg.polar import Polar
from optimizers.rules.parts.building_blocks import orthogonalize


def largest_slices(b: MatrixBatch, matrices: Tensor, axis: int, count: int) -> Steps[Tensor]:
    """Return the positions (b, count), ascending, of the rows (axis 0) or columns (axis 1) with the largest ℓ1 norms.

    Norms are summed in fp64: the choice hangs on their order, which then is that of one process in practice, and all
    ranks choose from the same sums.

    Args:
        b: the batch; `axis` must not be the one that is split.
        matrices: (b, m, n), or this process' interval of them.
    """
    assert b.split != axis
    norms = torch.linalg.vector_norm(matrices, ord=1, dim=-1 if axis == 0 else -2, dtype=torch.float64)
    norms = yield AllReduce(norms, b.split is not None)
    return norms.topk(count, dim=-1, sorted=False).indices.sort(-1).values


def _index(chosen: Tensor, matrices: Tensor, axis: int) -> Tensor:
    """Return positions (b, k) as an index of the chosen slices of matrices (b, m, n): (b, k, n) or (b, m, k)."""
    b, m, n = matrices.shape
    if axis == 0:
        return chosen[:, :, None].expand(b, chosen.shape[1], n)
    return chosen[:, None, :].expand(b, m, chosen.shape[1])


def take_slices(matrices: Tensor, chosen: Tensor, axis: int) -> Tensor:
    """Return the chosen rows (b, k, n) or columns (b, m, k) of matrices (b, m, n)."""
    return matrices.gather(axis + 1, _index(chosen, matrices, axis))


def spread_slices(like: Tensor, slices: Tensor, chosen: Tensor, axis: int) -> Tensor:
    """Return matrices of the shape of `like` that have these slices at the chosen positions, and zeros elsewhere."""
    return torch.zeros_like(like).scatter_(axis + 1, _index(chosen, like, axis), slices)


def decay_slices(matrices: Tensor, chosen: Tensor, axis: int, decay: float) -> Tensor:
    """Return the matrices (b, m, n) with the chosen rows or columns times `decay`."""
    factors = torch.ones(
        (len(matrices), matrices.shape[axis + 1]), dtype=matrices.dtype, device=matrices.device
    )
    factors.scatter_(1, chosen, decay)
    return matrices * factors.unsqueeze(-1 if axis == 0 else 1)


def orthogonalize_slices(b: MatrixBatch, slices: Tensor, axis: int) -> Steps[Polar]:
    """Return the factor of the chosen submatrices; of split ones, one owner of each computes it, and only they travel.

    Args:
        b: the batch; `axis` is not split.
        slices: (b, k, n) for axis 0, (b, m, k) for axis 1, or this process' interval along the other axis.
    """
    solve = partial(orthogonalize, options=b.options)
    if b.split is None:
        return solve(slices)
    assert b.shard_bounds is not None
    m, n = b.shape
    shape = (slices.shape[1], n) if axis == 0 else (m, slices.shape[2])
    return (yield GatherPolar(slices, shape, b.split - 2, b.shard_bounds, solve))
