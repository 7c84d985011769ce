"""SUMO: momentum in a gradient subspace, orthogonalized, plus the gradient outside it (arXiv 2505.24749).

    Ĝ = QᵀG      M ← μM + Ĝ      O = (MMᵀ)^(-1/2) M      W ← W - η α (s·QO + ρ·(G - QQᵀG))

`galore_muon` is this rule with ρ = 0, no transport and Newton-Schulz.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from optimizers.interfaces import (
    AllReduce,
    Axes,
    GatherPolar,
    InTurn,
    LowRank,
    MatrixBatch,
    Rule,
    SolveRoot,
    Steps,
    Update,
)
from optimizers.linalg.polar import Polar
from optimizers.rules.orthogonalize import momentum, orthogonalize, root_solver, scale
from optimizers.rules.subspace import (
    contracted,
    is_left,
    keeps_left,
    lift,
    moment_is_split,
    project,
    projection_traffic,
    rank_of,
    refresh,
    subspace_axes,
    subspace_state,
)


class Sumo(Rule):
    """SUMO with every published difference as an option (`optimizers.presets`)."""

    needs_whole: ClassVar[bool] = False

    def update(self, b: MatrixBatch) -> Steps[Update]:
        """Take the step of Algorithm 1; see the module's formula."""
        yield from refresh(
            b
        )  #                                   Block 1:  Q ← leading vectors of G, M ← QₙₑwᵀQ M
        g = yield project(b)  #                                              Ĝ = QᵀG
        yield from record_projected_norm(b, g)  #                            ‖Ĝ‖ ≤ ς asks for a new Q
        m = momentum(b, g)  #                                      Block 2:  M ← μM + Ĝ
        o = yield from orthogonalize_subspace(b, m)  #                       O = (MMᵀ)^(-1/2) M
        factor = yield from limit_growth(
            b, "factor", o.factor
        )  # Block 3:  ‖O‖ ≤ γ·(its norm in the last step)
        delta = yield from compose(b, g, factor)  #                Block 4:  α (s·QO + ρ·(G - QĜ))
        return Update(delta, m, o.factor, o.singular_values, o.fallbacks)

    def state(self, shape: tuple[int, int], options: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        """Return r(m + n) numbers, and one more for each of: norm-growth limiter, residual criterion."""
        state = subspace_state(shape, options)
        if options["norm_growth_limit"] is not None:
            state["previous_norm"] = ()
        if options["refresh_threshold"] is not None:
            state["projected_norm"] = ()
        return state

    def axes(self, shape: tuple[int, int], options: Mapping[str, Any]) -> dict[str, Axes]:
        """Return the axes of basis and moment; the norms are one number for the whole matrix."""
        return {**subspace_axes(shape, options), "previous_norm": (), "projected_norm": ()}

    def factors(self, shape: tuple[int, int], options: Mapping[str, Any]) -> tuple[int, float] | None:
        """Return the rank and factor of αρG + Q(sO - ρĜ); a limiter on residual or total needs it formed."""
        if _limits(options, "residual") or _limits(options, "total"):
            return None
        return rank_of(shape, options), options["alpha"] * options["residual_scale"]

    def row_traffic(
        self, shape: tuple[int, int], split: int, options: Mapping[str, Any], ranks: int
    ) -> float:
        """Return the bytes of Ĝ where Q contracts the split axis; else of Grams and roots (12r²), or of gathering."""
        if split == contracted(keeps_left(shape, options["side"])):
            return projection_traffic(shape, split, options, ranks)
        r = rank_of(shape, options)
        return min(12.0 * r * r, 8.0 * shape[split] * r / ranks) * (ranks - 1) / ranks

    def spectrum_of_state(self, options: Mapping[str, Any]) -> bool:
        """Return False with a look-ahead that is not stored."""
        return options["nesterov"] is not True


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


def compose(b: MatrixBatch, gradient: Tensor, factor: Tensor) -> Steps[Tensor | LowRank]:
    """Return α (ρ(G - QĜ) + s·QO), as α (ρG + Q(sO - ρĜ)), which never forms the residual.

    Args:
        b: the batch.
        gradient: Ĝ; overwritten.
        factor: O.
    """
    options = b.options
    s = scale(options["update_scale"], b.shape, b.fans, rank_of(b.shape, options))
    alpha, rho = options["alpha"], options["residual_scale"]
    if not (_limits(options, "residual") or _limits(options, "total")):
        return lift(b, gradient.mul_(-alpha * rho).add_(factor, alpha=s * alpha), keep=alpha * rho)
    # The limiter looks at what only exists as a whole matrix; one batch after the other forms it.
    yield InTurn()
    residual = yield from limit_growth(b, "residual", lift(b, -rho * gradient, keep=rho).dense(b))
    total = lift(b, s * factor).dense(b).add_(residual)
    return (yield from limit_growth(b, "total", total)).mul_(alpha)


def limit_growth(b: MatrixBatch, target: str, matrices: Tensor) -> Steps[Tensor]:
    """Scale matrices so that ‖·‖_F grows at most by γ a step, where the options limit this target.

    A last norm of 0 limits nothing.
    """
    if not _limits(b.options, target):
        return matrices
    is_split = moment_is_split(b) if target == "factor" else b.split is not None
    norm = yield from frobenius_norm(matrices, is_split)
    last = b.state["previous_norm"]
    limit = b.options["norm_growth_limit"] * last
    shrink = torch.where((last > 0) & (norm > limit), limit / norm, 1.0)
    b.commit("previous_norm", norm * shrink)
    return matrices * shrink[:, None, None]


def _limits(options: Mapping[str, Any], target: str) -> bool:
    if options["norm_growth_limit"] is None or options["norm_growth_target"] != target:
        return False
    return target != "residual" or bool(options["residual_scale"])


def record_projected_norm(b: MatrixBatch, gradient: Tensor) -> Steps[None]:
    """Store ‖Ĝ‖ where `refresh_threshold` watches it: at or below the threshold the next step renews the basis."""
    if b.options["refresh_threshold"] is not None:
        b.commit("projected_norm", (yield from frobenius_norm(gradient, moment_is_split(b))))


def frobenius_norm(matrices: Tensor, is_split: bool) -> Steps[Tensor]:
    """Return Frobenius norms (b,) of matrices, or of those that this process holds a part of; squares in fp64."""
    square = yield AllReduce(matrices.double().square().sum((-2, -1)), is_split)
    return square.sqrt().to(matrices.dtype)


RULE = Sumo()
