"""SUMO: momentum in a gradient subspace, orthogonalized, plus the gradient outside it (arXiv 2505.24749).

    Ĝ = QᵀG      M ← μM + Ĝ      O = (MMᵀ)^(-1/2) M      W ← W - η α (s·QO + ρ·(G - QQᵀG))

`galore_muon` is this rule with ρ = 0, no transport and Newton-Schulz.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from optimizers.layouts.rows import Rows
from optimizers.rules.factor import scale, subspace_factors
from optimizers.rules.momentum import momentum
from optimizers.rules.rule import Rule, Update
from optimizers.rules.subspace import (
    contracted,
    keeps_left,
    lifted,
    projected,
    projection_traffic,
    rank_of,
    refresh,
    subspace_axes,
    subspace_state,
)
from optimizers.stacks import Axes, LowRank, Stack


class Sumo(Rule):
    """SUMO with every published difference as an option (`optimizers.presets`)."""

    needs_whole: ClassVar[bool] = False

    def state(self, shape: tuple[int, int], options: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        """r(m + n) numbers, and one more for each of: norm-growth limiter, residual criterion."""
        state = subspace_state(shape, options)
        if options["norm_growth_limit"] is not None:
            state["previous_norm"] = ()
        if options["refresh_threshold"] is not None:
            state["projected_norm"] = ()
        return state

    def axes(self, shape: tuple[int, int], options: Mapping[str, Any]) -> dict[str, Axes]:
        """The norms are one number for the whole matrix."""
        return {**subspace_axes(shape, options), "previous_norm": (), "projected_norm": ()}

    def factors(self, shape: tuple[int, int], options: Mapping[str, Any]) -> tuple[int, float] | None:
        """αρG + Q(sO - ρĜ); a limiter on the residual or the whole update needs it formed."""
        if _limits(options, "residual") or _limits(options, "total"):
            return None
        return rank_of(shape, options), options["alpha"] * options["residual_scale"]

    def row_traffic(
        self, shape: tuple[int, int], split: int, options: Mapping[str, Any], ranks: int
    ) -> float:
        """Ĝ where Q contracts the axis that is split; else Grams and roots (12r²), or rows of moments to owners
        and back."""
        if split == contracted(keeps_left(shape, options["side"])):
            return projection_traffic(shape, split, options, ranks)
        r = rank_of(shape, options)
        return min(12.0 * r * r, 8.0 * shape[split] * r / ranks) * (ranks - 1) / ranks

    def step(self, stacks: Sequence[Stack], rows: Rows) -> Iterable[Update]:
        """One step of each stack; see the module's formula."""
        refresh(stacks, rows)
        lefts = [keeps_left(s.shape, s.options["side"]) for s in stacks]
        gradients = projected(stacks, lefts, rows)
        moments = [momentum(s, g) for s, g in zip(stacks, gradients)]
        splits = [s.split == 1 - contracted(left) for s, left in zip(stacks, lefts)]
        factors = subspace_factors(stacks, moments, lefts, rows)
        watched = [i for i, s in enumerate(stacks) if s.options["refresh_threshold"] is not None]
        norms = norms_of([gradients[i] for i in watched], [splits[i] for i in watched], rows)
        for i, norm in zip(watched, norms):
            stacks[i].commit("projected_norm", norm)
        limited = [i for i, s in enumerate(stacks) if _limits(s.options, "factor")]
        norms = norms_of([factors[i].factor for i in limited], [splits[i] for i in limited], rows)
        shrinks = {i: _shrink(stacks[i], norm) for i, norm in zip(limited, norms)}
        for i, (s, left, g, m, f) in enumerate(zip(stacks, lefts, gradients, moments, factors)):
            applied = f.factor * shrinks[i][:, None, None] if i in shrinks else f.factor
            yield Update(compose(s, left, g, applied, rows), m, f.factor, f.singular_values, f.fallbacks)

    def spectrum_of_state(self, options: Mapping[str, Any]) -> bool:
        """Not with a look-ahead that is not stored."""
        return options["nesterov"] is not True


def compose(stack: Stack, left: bool, gradient: Tensor, factor: Tensor, rows: Rows) -> Tensor | LowRank:
    """α (ρ(G - QĜ) + s·QO), as α (ρG + Q(sO - ρĜ)), which never forms the residual.

    Args:
        gradient: Ĝ; overwritten.
        factor: O.
    """
    options, basis = stack.options, stack.state["basis"]
    s = scale(options["update_scale"], stack.shape, stack.fans, rank_of(stack.shape, options))
    alpha, rho = options["alpha"], options["residual_scale"]
    if not (_limits(options, "residual") or _limits(options, "total")):
        moved = gradient.mul_(-alpha * rho).add_(factor, alpha=s * alpha)
        return lifted(basis, moved, left, keep=alpha * rho)
    # Block 3 on what only exists as a whole matrix: the target's Frobenius norm grows at most by γ a step.
    residual = lifted(basis, -rho * gradient, left, keep=rho).dense(stack)
    is_split = [stack.split is not None]
    if _limits(options, "residual"):
        residual *= _shrink(stack, norms_of([residual], is_split, rows)[0])[:, None, None]
    total = lifted(basis, s * factor, left).dense(stack).add_(residual)
    if _limits(options, "total"):
        total *= _shrink(stack, norms_of([total], is_split, rows)[0])[:, None, None]
    return total.mul_(alpha)


def norms_of(matrices: Sequence[Tensor], partial: Sequence[bool], rows: Rows) -> list[Tensor]:
    """Frobenius norms (b,) of stacks of which some (`partial`) are this rank's share; squares summed in fp64."""
    squares = [m.double().square().sum((-2, -1)) for m in matrices]
    return [total.sqrt().to(m.dtype) for total, m in zip(rows.total(squares, partial), matrices)]


def _limits(options: Mapping[str, Any], target: str) -> bool:
    if options["norm_growth_limit"] is None or options["norm_growth_target"] != target:
        return False
    return target != "residual" or bool(options["residual_scale"])


def _shrink(stack: Stack, norm: Tensor) -> Tensor:
    """(b,) factors ≤ 1 that keep ‖target‖ ≤ γ·(its norm in the last step); a last norm of 0 limits
    nothing."""
    last = stack.state["previous_norm"]
    limit = stack.options["norm_growth_limit"] * last
    factor = torch.where((last > 0) & (norm > limit), limit / norm, 1.0)
    stack.commit("previous_norm", norm * factor)
    return factor


RULE = Sumo()
