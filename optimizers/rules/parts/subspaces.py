"""Subspaces of a batch: their bases, the projection into them and back, and their renewal with what depends on them."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from optimizers.interfaces import MOVED_BASES, AllReduce, BroadcastBasis, LowRank, MatrixBatch, Steps
from optimizers.linalg.dct import dct_columns, leading_dct_columns
from optimizers.linalg.random_bases import random_basis, refresh_key
from optimizers.linalg.requests import answer_alone, drive
from optimizers.linalg.subspace import (
    basis_cut,
    randomized_basis,
    range_finder,
    sharded_canonical_signs,
    sharded_svd_basis,
    svd_basis,
    test_matrix,
)
from optimizers.linalg.tracking import geodesic_step, power_step
from optimizers.rules.parts.subspace_shapes import contracted, keeps_left, rank_of

OVERSAMPLING = 8
# Products with GᵀG in the range finder; fixed, so that every layout computes the same basis. With two a basis captures
# at least 0.98 of the best energy also on spectra as flat as i^-½, from a cold start too; with one it may miss 3 to 6 %
# of it, and saves a third of the time (docs/optimizers.md).
PASSES = 2


def is_left(b: MatrixBatch) -> bool:
    """Return `keeps_left` of a batch."""
    return keeps_left(b.shape, b.options["side"])


def is_contracted(b: MatrixBatch) -> bool:
    """Return True if this process holds an interval of the axis that Q contracts, so that sums over it are partial."""
    return b.split == contracted(is_left(b))


def moment_is_split(b: MatrixBatch) -> bool:
    """Return True if this process holds an interval of the moments: the axis that Q leaves is split."""
    return b.split == 1 - contracted(is_left(b))


def basis(b: MatrixBatch) -> Tensor:
    """Return Q, (b, m, r) or (b, n, r), or this process' rows of it."""
    return _columns_as_basis(b, b.state["columns"]) if "columns" in b.state else b.state["basis"]


def _columns_as_basis(b: MatrixBatch, columns: Tensor) -> Tensor:
    axis = contracted(is_left(b))
    rows = _rows_here(b, axis)
    return dct_columns(columns, b.shape[axis], rows.start, rows.stop)


def _rows_here(b: MatrixBatch, axis: int) -> slice:
    """Return which rows of a whole basis along this axis this process has."""
    if b.split != axis:
        return slice(0, b.shape[axis])
    return slice(b.start, b.start + b.matrices[0].view.shape[axis])


def project(b: MatrixBatch, q: Tensor) -> AllReduce:
    """Request Ĝ = QᵀG (or GQ): a sum over ranks where the axis that Q contracts is split."""
    return AllReduce(b.project(q, is_left(b)), partial=is_contracted(b))


def lift(b: MatrixBatch, q: Tensor, moved: Tensor, keep: float = 0.0) -> LowRank:
    """Return keep·G + Q·X, or keep·G + X·Qᵀ, as factors."""
    return LowRank(q, moved, keep) if is_left(b) else LowRank(moved, q.mT, keep)


def refresh(b: MatrixBatch) -> Steps[None]:
    """Renew the bases that are due, and what is kept in their coordinates.

    With `transport` the moment is carried over, M ← QₙₑwᵀQ M, with "projection_aware" Adam's second one, too. Without,
    the old moment is read in the new basis as it is, which is what GaLore does; a rule whose periods begin anew
    (`residual` unbiased) sets it to zero.
    """
    due = list(_due_runs(b))
    kind = "columns" if "columns" in b.state else "basis"
    old = b.state[kind]
    if b.options["basis"] in ("random", "gaussian"):
        # Every process makes the same numbers: nothing is sent.
        bases: list[Tensor] = [_random_bases(b, at) for at in due]
    else:
        # Lists, also empty ones: batches that renew nothing stay in step with those that do.
        m, n = b.shape
        bases = yield [
            BroadcastBasis(partial(_new_basis, b, at), old[at], (at.stop - at.start) * m * n * min(m, n))
            for at in due
        ]
    if b.options["transport"]:
        if kind == "columns":
            overlaps = [_same_columns(new, old[at]) for at, new in zip(due, bases)]
        else:
            overlaps = yield [AllReduce(new.mT @ old[at], is_contracted(b)) for at, new in zip(due, bases)]
        for at, overlap in zip(due, overlaps):
            _transport(b, overlap, at)
    for at, new in zip(due, bases):
        b.commit(kind, new, at)
        if b.options["residual"] == "unbiased":
            b.commit("moment", torch.zeros_like(b.state["moment"][at]), at)


def _same_columns(new: Tensor, old: Tensor) -> Tensor:
    """Return the overlap (b', r, r) of two choices of DCT columns, of exact ones and zeros.

    A column that is new starts with moments of zero; Adam would divide the rounding of a product in one moment by that
    in the other.
    """
    return ((new[:, :, None] == old[:, None, :]) & (new >= 0)[:, :, None]).to(new.dtype)


def _due_runs(b: MatrixBatch) -> Iterator[slice]:
    """Yield the positions that are due as slices of which all or none have a basis that can be gone on from."""
    if b.options["basis"] not in MOVED_BASES:
        yield from b.due_slices()
        return
    for run in b.due_slices():
        start = run.start
        for position in range(run.start + 1, run.stop + 1):
            if position == run.stop or (position in b.fresh) != (start in b.fresh):
                yield slice(start, position)
                start = position


def _transport(b: MatrixBatch, overlap: Tensor, at: slice) -> None:
    """Carry the moments `at` into new coordinates, by the overlap R = QₙₑwᵀQ (b', r, r)."""
    moment = b.state["moment"][at]
    if b.options["transport"] == "projection_aware":
        b.commit("second_moment", _carried_second_moment(b, overlap, at), at)
    b.commit("moment", _carried(b, overlap, moment), at)


def _carried(b: MatrixBatch, overlap: Tensor, moment: Tensor) -> Tensor:
    return overlap @ moment if is_left(b) else moment @ overlap.mT


def _carried_second_moment(b: MatrixBatch, overlap: Tensor, at: slice) -> Tensor:
    """Return (1 - β₂ᵗ)·|R∘R (V̂ - M̂²) + (R M̂)²|: the variance of independent coordinates, and their mean (LDAdam).

    t counts the steps before this one; before the first there is nothing to carry.
    """
    (beta1, beta2), before = b.options["betas"], b.steps_before(at)
    bias1 = torch.where(before > 0, 1.0 - beta1**before, 1.0)
    bias2 = torch.where(before > 0, 1.0 - beta2**before, 1.0)
    dtype = overlap.dtype
    first = b.state["moment"][at] / bias1.to(dtype)
    second = b.state["second_moment"][at] / bias2.to(dtype)
    variance = _carried(b, overlap.square(), second - first.square())
    return (variance + _carried(b, overlap, first).square()).abs() * bias2.to(dtype)


def refresh_number(step: int, options: Any, offset: int) -> int:
    """Return which renewal of this matrix the one at `step` is, counted from 0."""
    interval = options["refresh_interval"]
    return (step + offset) // interval - offset // interval


def _random_bases(b: MatrixBatch, at: slice) -> Tensor:
    """Return (b', rows here, r) bases of random numbers, a function of seed, matrix and step."""
    axis = contracted(is_left(b))
    rows, rank = _rows_here(b, axis), rank_of(b.shape, b.options)
    like, is_orthonormal = b.state["basis"][at], b.options["basis"] == "random"
    if like.device.type == "meta":
        return torch.empty_like(like)
    keys = [
        refresh_key(b.options["seed"], matrix.block.name, step)
        for matrix, step in zip(b.matrices[at], b.steps[at])
    ]
    whole = random_basis(keys, b.shape[axis], rank, like.device, is_orthonormal)
    return whole[:, rows].to(like.dtype)


def _new_basis(b: MatrixBatch, at: slice) -> Tensor | Generator[Any, Any, Tensor]:
    """Return (b', m or n, r) bases for the gradients `at`, or (b', r) columns; of split ones, the steps to them."""
    gradient, options = b.gradient[at], b.options
    left = is_left(b)
    side = "left" if left else "right"
    rank, kind = rank_of(b.shape, options), options["basis"]
    rtol = basis_cut(b.shape, gradient.dtype)
    if kind == "dct":
        return _ran(b, leading_dct_columns(gradient, rank, left, rtol, b.split, b.start, b.shape))
    if kind in MOVED_BASES:
        if at.start not in b.fresh:
            return _ran(b, _next_basis(b, gradient, at))
        kind = "svd"
    if b.split is None:
        if kind == "svd":
            return svd_basis(gradient, rank, side)
        test = _test_matrices(b, at, rank)
        return randomized_basis(gradient, rank, side, test, passes=PASSES, warm=b.state["basis"][at])
    if kind == "svd":
        steps = sharded_svd_basis(gradient, rank, side, rtol, b.split)
    else:
        test, warm = _test_matrices(b, at, rank).to(gradient), b.state["basis"][at]
        if b.split == 1:
            test = test[:, b.start : b.start + gradient.shape[-1]]
        steps = range_finder(gradient, rank, side, test, PASSES, warm, rtol, b.split)
    return sharded_canonical_signs(steps, b.split == contracted(left), b.start)


def _ran(b: MatrixBatch, steps: Generator[Any, Any, Tensor]) -> Tensor | Generator[Any, Any, Tensor]:
    """Run the steps to a basis here where nothing is split."""
    return drive(steps, answer_alone) if b.split is None else steps


def _next_basis(b: MatrixBatch, gradient: Tensor, at: slice) -> Generator[Any, Any, Tensor]:
    """Return the steps from the last basis to the next one, for bases that are moved on."""
    options, last, left = b.options, b.state["basis"][at], is_left(b)
    g = gradient if left else gradient.mT
    if options["basis"] == "tracked":
        return geodesic_step(g, last, options["track_step"], is_contracted(b), moment_is_split(b))
    before = b.steps_before(at)
    bias = torch.where(before > 0, 1.0 - options["betas"][0] ** before, 1.0).to(last.dtype)
    first = b.state["moment"][at] / bias
    rho = options["subspace_momentum"]
    return power_step(g, last, first if left else first.mT, rho, is_contracted(b), moment_is_split(b))


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
        tests.append(test_matrix(options["seed"], matrix.block.name, number, shape, device))
    return torch.stack(tests)


class CarriedMoment:
    """The moment before and after a refresh, for rules that feed back what it lost there.

    Attributes:
        basis, moment: before; None where nothing is fed back.
        carried: the moment in the new coordinates, before the step changes it.
    """

    def __init__(self, b: MatrixBatch) -> None:
        self._batch = b
        self.basis: Tensor | None = None
        self.moment = self.carried = b.state["moment"]
        self._is_kept = b.options["error_feedback"] == "generalized"
        if self._is_kept:
            self.basis, self.moment = basis(b).clone(), self.moment.clone()

    def after_refresh(self) -> None:
        """Take note of the moment in the new coordinates."""
        if self._is_kept:
            self.carried = self._batch.state["moment"].clone()


def keep_error(b: MatrixBatch, q: Tensor, projected: Tensor, carried: CarriedMoment) -> None:
    """Store what this step leaves out: E ← G - QĜ, and with "generalized" β₁/(1 - β₁)·(Q₋M₋ - Q M) of the refresh.

    G includes the last error (arXiv 2410.16103, Algorithm 1; arXiv 2505.17967 has the first part alone).

    Args:
        b: whose gradients are G.
        q: Q.
        projected: Ĝ.
        carried: Q₋ and M₋ before the refresh, M after it.
    """
    error = b.gradient
    if carried.basis is None:
        error = error - lift(b, q, projected).dense(b)
    else:
        beta1 = b.options["betas"][0]
        weight = beta1 / (1.0 - beta1)
        error = error - lift(b, q, torch.add(projected, carried.carried, alpha=weight)).dense(b)
        error += lift(b, carried.basis, carried.moment * weight).dense(b)
    b.commit("error", error)
