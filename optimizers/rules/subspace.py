"""What SUMO and GaLore share: a basis Q per matrix, the projection onto it, and its renewal."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from optimizers.interfaces import AllReduce, Axes, BroadcastBasis, LowRank, MatrixBatch, Steps
from optimizers.linalg import sketching
from optimizers.linalg.subspace import basis_cut, randomized_basis, svd_basis, test_matrix
from optimizers.presets import default_rank

OVERSAMPLING = 8
# Products with GᵀG in the range finder; fixed, so that every layout computes the same basis. With two a basis captures
# at least 0.98 of the best energy also on spectra as flat as i^-½, from a cold start too; with one it may miss 3 to 6 %
# of it, and saves a third of the time (docs/optimizers.md).
PASSES = 2


def keeps_left(shape: tuple[int, int], side: str) -> bool:
    """Return True if Q multiplies from the left (Ĝ = QᵀG, r×n) rather than from the right (Ĝ = GQ, m×r).

    "short": the moment keeps the short side; square: from the left. "long": the long side; square: from the
    right.
    """
    m, n = shape
    return m >= n if side == "short" else m < n


def is_left(b: MatrixBatch) -> bool:
    """Return `keeps_left` of a batch."""
    return keeps_left(b.shape, b.options["side"])


def rank_of(shape: tuple[int, int], options: Mapping[str, Any]) -> int:
    """Return r: the option, or a quarter of the short side."""
    rank = options["rank"]
    return default_rank(*shape) if rank is None else rank


def subspace_state(shape: tuple[int, int], options: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of "basis" (m×r or n×r) and "moment" (r×n or m×r)."""
    (m, n), r = shape, rank_of(shape, options)
    if keeps_left(shape, options["side"]):
        return {"basis": (m, r), "moment": (r, n)}
    return {"basis": (n, r), "moment": (m, r)}


def subspace_axes(shape: tuple[int, int], options: Mapping[str, Any]) -> dict[str, Axes]:
    """Return which axis of the matrix (0 rows, 1 columns) each dimension of `subspace_state` runs along."""
    if keeps_left(shape, options["side"]):
        return {"basis": (0, None), "moment": (None, 1)}
    return {"basis": (1, None), "moment": (0, None)}


def projection_traffic(shape: tuple[int, int], split: int, options: Mapping[str, Any], ranks: int) -> float:
    """Return the bytes of Ĝ that a rank sends for one matrix: an all-reduce where Q contracts the split axis."""
    left = keeps_left(shape, options["side"])
    if split != contracted(left):
        return 0.0
    return 8.0 * rank_of(shape, options) * shape[1 - split] * (ranks - 1) / ranks


def contracted(left: bool) -> int:
    """Return the axis that Q contracts, which is also the one that its rows run along."""
    return 0 if left else 1


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
