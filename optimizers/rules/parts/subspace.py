"""Work in a subspace: a basis Q per matrix, its renewal, the projection onto it, and polar factors of its moments."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from optimizers.interfaces import (
    AllReduce,
    BroadcastBasis,
    GatherPolar,
    LowRank,
    MatrixBatch,
    SolveRoot,
    Steps,
)
from optimizers.linalg import sketching
from optimizers.linalg.polar import Polar
from optimizers.linalg.subspace import basis_cut, randomized_basis, svd_basis, test_matrix
from optimizers.rules.parts.low_rank import contracted, keeps_left, rank_of
from optimizers.rules.parts.orthogonal import orthogonalize, root_solver

OVERSAMPLING = 8
# Products with GᵀG in the range finder; fixed, so that every layout computes the same basis. With two a basis captures
# at least 0.98 of the best energy also on spectra as flat as i^-½, from a cold start too; with one it may miss 3 to 6 %
# of it, and saves a third of the time (docs/optimizers.md).
PASSES = 2


def is_left(b: MatrixBatch) -> bool:
    """Return `keeps_left` of a batch."""
    return keeps_left(b.shape, b.options["side"])


def moment_is_split(b: MatrixBatch) -> bool:
    """Return True if this process holds an interval of the moments: the axis that Q leaves is split."""
    return b.split == 1 - contracted(is_left(b))


def project(b: MatrixBatch) -> AllReduce:
    """Request Ĝ = QᵀG (or GQ): a sum over ranks where the axis that Q contracts is split."""
    left = is_left(b)
    return AllReduce(b.project(b.state["basis"], left), partial=b.split == contracted(left))


def lift(b: MatrixBatch, moved: Tensor, keep: float = 0.0) -> LowRank:
    """Return keep·G + Q·X, or keep·G + X·Qᵀ, as factors."""
    basis = b.state["basis"]
    return LowRank(basis, moved, keep) if is_left(b) else LowRank(moved, basis.mT, keep)


def refresh(b: MatrixBatch) -> Steps[None]:
    """Renew the bases that are due, and carry their moments over with `transport`: M ← QₙₑwᵀQ M.

    Without transport the old moment is read in the new basis as it is; that is what GaLore does.
    """
    left, old, moment = is_left(b), b.state["basis"], b.state["moment"]
    due = list(b.due_slices())
    # Lists, also empty ones: batches that renew nothing stay in step with those that do.
    bases = yield [BroadcastBasis(partial(_new_basis, b, at), old[at]) for at in due]
    if b.options["transport"]:
        is_partial = b.split == contracted(left)
        overlaps = yield [AllReduce(new.mT @ old[at], is_partial) for at, new in zip(due, bases)]
        for at, overlap in zip(due, overlaps):
            b.commit("moment", overlap @ moment[at] if left else moment[at] @ overlap.mT, at)
    for at, new in zip(due, bases):
        b.commit("basis", new, at)


def orthogonalize_subspace(b: MatrixBatch, moment: Tensor) -> Steps[Polar]:
    """Return the factor of subspace moments, r×n (left) or m×r; where the method allows it, through the r×r Gram.

    The Gram is all that has to cross ranks, and for fp32 moments it loses nothing: the cut max(m, n)·eps32 lies above
    the 1e-6 below which an fp64 Gram cannot see. A split moment takes the Gram whatever the method: the exact ones its
    fp64 root, the polynomial ones the same polynomial of the Gram; where that would send more, it goes to an owner.
    """
    left, is_split, r = is_left(b), moment_is_split(b), b.state["basis"].shape[-1]
    shape = (r, b.shape[1]) if left else (b.shape[0], r)
    if is_split and b.shard_bounds is not None and prefers_gather(max(shape), r, len(b.shard_bounds)):
        solve = partial(orthogonalize, options=b.options)
        return (yield GatherPolar(moment, shape, -1 if left else -2, b.shard_bounds, solve))
    solver = root_solver(moment, shape, b.options, is_split)
    if solver is None:
        return orthogonalize(moment, b.options)
    gram = _gram(moment, left)
    root = yield SolveRoot(gram, solver, is_split)
    x = root.root.to(moment.dtype)
    factor = x @ moment if left else moment @ x
    # 0·NaN is NaN: the zero root of a matrix that is not finite does not silence it.
    broken = ~torch.isfinite(gram.diagonal(dim1=-2, dim2=-1).sum(-1))[:, None, None]
    return Polar(factor.masked_fill_(broken, 0.0), root.singular_values, root.effective_rank, root.fallbacks)


def prefers_gather(length: int, rank: int, ranks: int) -> bool:
    """Return True if gathering a moment costs less than reducing its Gram: 8·length·r/W against 12r² bytes."""
    return 2 * length < 3 * rank * ranks


def _gram(moment: Tensor, left: bool) -> Tensor:
    # A function of its own, so that the fp64 copy does not outlive it.
    wide = moment.double()
    return wide @ wide.mT if left else wide.mT @ wide


def refresh_number(step: int, options: Mapping[str, Any], offset: int) -> int:
    """Return which renewal of this matrix the one at `step` is, counted from 0."""
    interval = options["refresh_interval"]
    return (step + offset) // interval - offset // interval


def _new_basis(b: MatrixBatch, at: slice) -> Tensor | Generator[Any, Any, Tensor]:
    """Return (b', m or n, r) leading singular vectors of the gradients `at`; of split ones, the steps to them."""
    gradient, options = b.gradient[at], b.options
    left = is_left(b)
    side = "left" if left else "right"
    rank = rank_of(b.shape, options)
    if b.split is None:
        if options["basis"] == "svd":
            return svd_basis(gradient, rank, side)
        test = _test_matrices(b, at, rank)
        return randomized_basis(gradient, rank, side, test, passes=PASSES, warm=b.state["basis"][at])
    rtol = basis_cut(b.shape, gradient.dtype)
    if options["basis"] == "svd":
        steps = sketching.exact(gradient, rank, side, rtol, b.split)
    else:
        test, warm = _test_matrices(b, at, rank).to(gradient), b.state["basis"][at]
        if b.split == 1:
            test = test[:, b.start : b.start + gradient.shape[-1]]
        steps = sketching.range_finder(gradient, rank, side, test, PASSES, warm, rtol, b.split)
    return sketching.canonical(steps, b.split == contracted(left), b.start)


def _test_matrices(b: MatrixBatch, at: slice, rank: int) -> Tensor:
    """Return (b', n, rank + oversampling) test matrices of the matrices `at`, on the batch's device."""
    shape = b.shape[1], min(rank + OVERSAMPLING, *b.shape)
    device = b.state["basis"].device
    if device.type == "meta":
        # A plan needs the shape only; drawing the numbers of a 7B model takes a minute.
        return torch.empty((at.stop - at.start, *shape), device=device)
    options, tests = b.options, []
    for matrix, step in zip(b.matrices[at], b.steps[at]):
        number = refresh_number(step, options, matrix.offset)
        tests.append(test_matrix(options["seed"], matrix.block.name, number, shape))
    return torch.stack(tests).to(device, non_blocking=True)
