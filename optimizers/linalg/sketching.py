"""Subspace bases of matrices that may be split over ranks: the algorithms, with their communication left out.

Each is a generator of `linalg.requests`: `answer_alone` answers on the spot, a sharded layout by collectives for all
matrices of a batch.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import torch
from torch import Tensor

from optimizers.linalg.inverse_root import GRAM_RTOL, root_by_eigh
from optimizers.linalg.requests import AllGather, AllReduce, Eigh
from optimizers.linalg.robust import cleaned, finite_matrices

# Pivots of a Cholesky factor that span more than this leave too few digits: the eigenvalue branch takes over.
_PIVOT = 1e-7

Steps = Generator[AllReduce | AllGather | Eigh, Any, Tensor]
"""A basis in the making; returns (b, rows, rank)."""


def range_finder(
    gradient: Tensor,
    rank: int,
    side: str,
    sketch: Tensor,
    passes: int,
    warm: Tensor | None,
    rtol: float,
    split: int | None = None,
) -> Steps:
    """Compute `subspace.randomized_basis` of a batch, or of this rank's rows or columns of one.

    Args:
        gradient: (b, m, n), fp32 or fp64; with split=0 (b, m_local, n), with split=1 (b, m, n_local).
        rank, side, passes, rtol: as for `randomized_basis`; rtol is required.
        sketch: (b, n or n_local, rank + oversampling): with split=1 this rank's rows of the whole test matrix,
            so that all layouts draw the same one.
        warm: previous basis (its local rows where it is split), or None.
        split: axis that is split over ranks; None: whole matrices.

    Returns:
        The left basis by rows where rows are split, the right one by rows where columns are, else whole and
        equal on all ranks. Signs as they come.
    """
    rows, columns = split == 0, split == 1
    if side == "right":
        block = yield from _with_warm(sketch, warm, columns)
        product = block
        for _ in range(passes):
            left = yield from orthonormal((yield AllReduce(gradient @ block, columns)), rows)
            product = yield AllReduce(gradient.mT @ left, rows)
            block = yield from orthonormal(product, columns)
        wide = product.double()
        gram = yield AllReduce(wide.mT @ wide, columns)
        values, rotation, keep = yield from _ritz(gram, rank, rtol)
        return torch.where(keep, wide @ rotation / values, 0.0).to(gradient.dtype)
    block = yield from _with_warm((yield AllReduce(gradient @ sketch, columns)), warm, rows)
    for _ in range(passes):
        left = yield from orthonormal(block, rows)
        right = yield from orthonormal((yield AllReduce(gradient.mT @ left, rows)), columns)
        block = yield AllReduce(gradient @ right, columns)
    # Twice: the first pass leaves an orthogonality error of eps32 times the sketch's condition number.
    block = yield from orthonormal((yield from orthonormal(block, rows)), rows)
    product = (yield AllReduce(gradient.mT @ block, rows)).double()
    gram = yield AllReduce(product.mT @ product, columns)
    _, rotation, keep = yield from _ritz(gram, rank, rtol)
    return torch.where(keep, block @ rotation.to(gradient.dtype), 0.0)


def exact(gradient: Tensor, rank: int, side: str, rtol: float, split: int) -> Steps:
    """Compute `subspace.svd_basis` of matrices that are sharded over ranks, without gathering one.

    Through the fp64 Gram of the axis that is not split, which is a sum over ranks. That axis may be the long
    one: then 8·long² bytes travel instead of 8·short² (let the layout split the long axis).

    Args:
        gradient: (b, m_local, n) for split=0, (b, m, n_local) for split=1.
        rank, side, rtol: as for `svd_basis`; rtol is required.
    """
    wide = gradient.double()
    tall = wide if split == 0 else wide.mT
    gram = yield AllReduce(tall.mT @ tall, True)
    values, vectors, keep = yield from _ritz(gram, rank, rtol)
    if (side == "left") == (split == 0):  # the wanted vectors live on the split axis
        vectors = tall @ vectors / values
    return torch.where(keep, vectors, 0.0).to(gradient.dtype)


def canonical(steps: Steps, is_split: bool, start: int) -> Steps:
    """Apply `subspace.canonical_signs` to a basis whose rows may be sharded over ranks.

    Args:
        steps: makes the basis.
        is_split: its rows are.
        start: index of this rank's first row in the whole basis.
    """
    basis = yield from steps
    size = basis.abs()
    rows = basis.shape[-2]
    own = size.amax(-2) if rows else size.new_zeros(basis.shape[0], basis.shape[-1])
    top = (yield AllGather(own)).amax(0) if is_split else own
    tied = size >= (top * (1.0 - 16.0 * torch.finfo(basis.dtype).eps))[:, None, :]
    # fp64 holds any index exactly, so that index and sign travel in one tensor. A column that holds NaN ties
    # nowhere; it stays what it is.
    index = torch.arange(start, start + rows, device=basis.device, dtype=torch.float64)[:, None]
    if rows:
        candidates = torch.where(tied, index, torch.inf)
        first = candidates.amin(-2)
        leader = basis.gather(-2, candidates.argmin(-2, keepdim=True)).squeeze(-2).double()
    else:
        first = torch.full(top.shape, torch.inf, dtype=torch.float64, device=basis.device)
        leader = torch.zeros_like(first)
    if is_split:
        found = yield AllGather(torch.stack([first, leader]))
        best = found[:, 0].argmin(0, keepdim=True)
        leader = found[:, 1].gather(0, best).squeeze(0)
    return torch.where((leader < 0)[:, None, :], -basis, basis)


def orthonormal(block: Tensor, is_split: bool) -> Steps:
    """Run one CholeskyQR pass over the columns of (b, L, k), whose rows may be sharded over ranks.

    Columns are scaled to length 1 first. Where Cholesky breaks down (dependent columns) the block is
    multiplied by the pseudo-inverse square root of its Gram instead: columns with the same span, with BᵀB a
    projector. Both are smooth maps of the summed Gram, so that every rank may compute them for itself.
    """
    wide = block.double()
    gram = yield AllReduce(wide.mT @ wide, is_split)
    finite = finite_matrices(gram)
    gram, block = cleaned(gram, finite), cleaned(block, finite)
    length = gram.diagonal(dim1=-2, dim2=-1).clamp_min(0.0).sqrt()
    inverse = torch.where(length > 0, 1.0 / length, 0.0)
    gram = gram * inverse[:, :, None] * inverse[:, None, :]
    factor, info = torch.linalg.cholesky_ex(gram)
    pivots = factor.diagonal(dim1=-2, dim2=-1)
    broken = (info != 0) | ~(pivots.amin(-1) > _PIVOT * pivots.amax(-1))
    identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    safe = torch.where(broken[:, None, None], identity, factor)
    transform = torch.linalg.solve_triangular(safe.mT, identity.expand_as(safe), upper=True)
    # Meta tensors (traffic plans) have no numbers to look at.
    again = broken.nonzero().squeeze(-1) if broken.device.type != "meta" else None
    if again is not None and again.numel():
        transform = transform.index_copy(0, again, root_by_eigh(gram[again], GRAM_RTOL)[0])
    return block @ (inverse[:, :, None] * transform).to(block.dtype)


def _with_warm(sketch: Tensor, warm: Tensor | None, is_split: bool) -> Steps:
    if warm is None:
        return sketch
    rank = warm.shape[-1]
    used = (yield AllReduce(warm.square().sum(-2, keepdim=True), is_split)) > 0
    return torch.cat([torch.where(used, warm, sketch[..., :rank]), sketch[..., rank:]], -1)


def _ritz(gram: Tensor, rank: int, rtol: float) -> Generator[Eigh, Any, tuple[Tensor, Tensor, Tensor]]:
    """Return leading singular values (b, 1, rank), rotation (b, k, rank), and which are above the cut (b, 1, rank)."""
    values, vectors = yield Eigh(cleaned(gram, finite_matrices(gram)))
    values = values.flip(-1)[:, None, :rank].clamp_min(0.0)
    keep = values > rtol**2 * values[..., :1]
    return torch.where(keep, values, 1.0).sqrt(), vectors.flip(-1)[..., :rank], keep
