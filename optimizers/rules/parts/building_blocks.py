"""The building blocks of rules: momentum and its orthogonal factor, subspaces and their renewal, norm limits."""

from __future__ import annotations

import math
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

# Rules take them from here, so that their own modules import no torch.
from optimizers.interfaces import InTurn as InTurn
from optimizers.interfaces import Update as Update
from optimizers.linalg.inverse_root import RootSolver
from optimizers.linalg.newton_schulz import cubic, newton_schulz, polar_express
from optimizers.linalg.polar import Polar, polar
from optimizers.linalg.robust import GRAM_RTOL, choose_method, default_rtol
from optimizers.linalg.subspace import (
    basis_cut,
    randomized_basis,
    range_finder,
    sharded_canonical_signs,
    sharded_svd_basis,
    svd_basis,
    test_matrix,
)
from optimizers.rules.parts.subspace_shapes import keeps_left, rank_of


def projection_traffic(shape: tuple[int, int], split: int, options: Mapping[str, Any], ranks: int) -> float:
    """Return the bytes of Ĝ that a rank sends for one matrix: an all-reduce where Q contracts the split axis."""
    left = keeps_left(shape, options["side"])
    if split != contracted(left):
        return 0.0
    return 8.0 * rank_of(shape, options) * shape[1 - split] * (ranks - 1) / ranks


def contracted(left: bool) -> int:
    """Return the axis that Q contracts, which is also the one that its rows run along."""
    return 0 if left else 1


def limits_growth(options: Mapping[str, Any], target: str) -> bool:
    """Return True if `norm_growth_limit` bounds this target: "factor", "residual" or "total"."""
    if options["norm_growth_limit"] is None or options["norm_growth_target"] != target:
        return False
    return target != "residual" or bool(options["residual_scale"])


_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_ITERATIONS = {"newton_schulz": newton_schulz, "cubic": cubic, "polar_express": polar_express}


def momentum(b: MatrixBatch, gradient: Tensor, overwrites: bool = False) -> Tensor:
    """Advance the state "moment" by a (projected) gradient; return what is to be orthogonalized.

    sum: M ← μM + G, look-ahead G + μM (Moonlight, SUMO). ema: M ← μM + (1 - μ)G, look-ahead (1 - μ)G + μM
    (Jordan). nesterov "stored": the look-ahead also replaces M in the state, so that M ← (1 + μ)G + μ²M (what
    the public SUMO code does).

    Args:
        b: batch whose moments are advanced.
        gradient: (b, …), of the shape of the moment.
        overwrites: a look-ahead that is not stored may take the gradient's memory.
    """
    mu, nesterov = b.options["momentum"], b.options["nesterov"]
    weight = 1.0 if b.options["momentum_form"] == "sum" else 1.0 - mu
    if nesterov == "stored":
        return b.blend("moment", gradient, mu * mu, weight * (1.0 + mu))
    moment = b.blend("moment", gradient, mu, weight)
    if not nesterov:
        return moment
    if weight == 1.0:
        return gradient.add_(moment, alpha=mu) if overwrites else torch.add(gradient, moment, alpha=mu)
    return gradient.lerp_(moment, mu) if overwrites else torch.lerp(gradient, moment, mu)


def orthogonalize(moment: Tensor, options: Mapping[str, Any]) -> Polar:
    """Return the factor of whole matrices (b, m, n).

    A matrix that is not finite gets a zero factor and counts as a fallback.
    """
    method = options["orthogonalizer"]
    if method not in _ITERATIONS:
        return polar(moment, method)
    dtype = _DTYPES[options["orthogonalizer_dtype"]]
    if moment.dtype == torch.float64 and dtype == torch.float32:
        dtype = torch.float64
    factor = _ITERATIONS[method](moment, options["orthogonalizer_steps"], dtype=dtype)
    # The norm and the first product spread a NaN or Inf over every row of its own matrix: one row tells.
    broken = ~torch.isfinite(factor[:, 0]).all(-1)
    return Polar(factor.masked_fill_(broken[:, None, None], 0.0), None, None, broken.sum())


def root_solver(
    moment: Tensor, shape: tuple[int, int], options: Mapping[str, Any], is_split: bool
) -> RootSolver | None:
    """Return how the Gram becomes its inverse root; None: the moment is orthogonalized as it is."""
    method = options["orthogonalizer"]
    if method in _ITERATIONS:
        if not is_split:
            return None
        return RootSolver(method, steps=options["orthogonalizer_steps"], dtype=moment.dtype)
    if method == "auto":
        method = choose_method(shape, moment.dtype, moment.device)
    if is_split and method not in ("gram", "dwh"):
        method = "gram"
    if method in ("gram", "dwh") and (is_split or moment.dtype == torch.float32):
        return RootSolver(method, max(GRAM_RTOL, default_rtol(shape, moment.dtype)), dtype=moment.dtype)
    return None


def scale(name: str, shape: tuple[int, int], fans: tuple[int, int], rank: int) -> float:
    """Return the factor on an orthogonal update of an m×n matrix.

    Args:
        name: "none"; "rms_max" 0.2·√max(m, n) (Moonlight); "rows_cols" √max(1, out/in) (Jordan); "rms_rank"
            0.2·√(mn/r), for which the update's RMS is 0.2 whatever the rank.
        fans: (out, in), which differ from (m, n) where the weight is stored transposed.
    """
    m, n = shape
    if name == "rms_max":
        return 0.2 * math.sqrt(max(m, n))
    if name == "rows_cols":
        return math.sqrt(max(1.0, fans[0] / fans[1]))
    if name == "rms_rank":
        return 0.2 * math.sqrt(m * n / rank)
    return 1.0


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
    m, n = b.shape
    bases = yield [
        BroadcastBasis(partial(_new_basis, b, at), old[at], (at.stop - at.start) * m * n * min(m, n))
        for at in due
    ]
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
        steps = sharded_svd_basis(gradient, rank, side, rtol, b.split)
    else:
        test, warm = _test_matrices(b, at, rank).to(gradient), b.state["basis"][at]
        if b.split == 1:
            test = test[:, b.start : b.start + gradient.shape[-1]]
        steps = range_finder(gradient, rank, side, test, PASSES, warm, rtol, b.split)
    return sharded_canonical_signs(steps, b.split == contracted(left), b.start)


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
