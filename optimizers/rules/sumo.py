"""SUMO: momentum in a gradient subspace, orthogonalized, plus the gradient outside it (arXiv 2505.24749).

    Ĝ = QᵀG      M ← μM + Ĝ      O = (MMᵀ)^(-1/2) M      W ← W - η α (s·QO + ρ·(G - QQᵀG))

`galore_muon` is this rule with ρ = 0, no transport and Newton-Schulz.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from optimizers.layouts.replicated import Rows
from optimizers.rules.factor import gram_factors, scale
from optimizers.rules.momentum import momentum
from optimizers.rules.rule import Rule, Update
from optimizers.rules.subspace import keeps_left, project, project_back, rank_of, refresh, subspace_state
from optimizers.stacks import Stack


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

    def step(self, stacks: Sequence[Stack], rows: Rows) -> Iterable[Update]:
        """One step of each stack; see the module's formula."""
        refresh(stacks, rows)
        lefts = [keeps_left(s.shape, s.options["side"]) for s in stacks]
        projected = rows.total(
            [project(s.gradient, s.state["basis"], left) for s, left in zip(stacks, lefts)]
        )
        moments = [momentum(s, g) for s, g in zip(stacks, projected)]
        factors = gram_factors(moments, lefts, [s.options for s in stacks], rows)
        for s, left, g, m, f in zip(stacks, lefts, projected, moments, factors):
            if s.options["refresh_threshold"] is not None:
                s.commit("projected_norm", torch.linalg.matrix_norm(g))
            yield Update(compose(s, left, g, f.factor), m, f.factor, f.singular_values, f.fallbacks)

    def spectrum_of_state(self, options: Mapping[str, Any]) -> bool:
        """Not with a look-ahead that is not stored."""
        return options["nesterov"] is not True


def compose(stack: Stack, left: bool, projected: Tensor, factor: Tensor) -> Tensor:
    """(b, m, n): α (ρ(G - QĜ) + s·QO), as α (ρG + Q(sO - ρĜ)), which never forms the residual."""
    options, basis = stack.options, stack.state["basis"]
    s = scale(options["update_scale"], stack.shape, stack.fans, rank_of(stack.shape, options))
    alpha, rho = options["alpha"], options["residual_scale"]
    if options["norm_growth_limit"] is not None:
        return _limited(stack, left, projected, factor, s)
    moved = torch.add(s * alpha * factor, projected, alpha=-alpha * rho)
    return project_back(basis, moved, left, out=stack.gradient, keep=alpha * rho)


def _limited(stack: Stack, left: bool, projected: Tensor, factor: Tensor, s: float) -> Tensor:
    """The same with Block 3: the target's Frobenius norm grows at most by γ from step to step."""
    options, basis = stack.options, stack.state["basis"]
    alpha, rho, target = options["alpha"], options["residual_scale"], options["norm_growth_target"]
    if target == "factor":
        factor = factor * _shrink(stack, factor)[:, None, None]
        moved = torch.add(s * alpha * factor, projected, alpha=-alpha * rho)
        return project_back(basis, moved, left, out=stack.gradient, keep=alpha * rho)
    residual = project_back(basis, -rho * projected, left, out=stack.gradient, keep=rho) if rho else None
    if target == "residual" and residual is not None:
        residual *= _shrink(stack, residual)[:, None, None]
    out = residual if residual is not None else stack.gradient
    total = project_back(basis, s * factor, left, out=out, keep=1.0 if residual is not None else 0.0)
    if target == "total":
        total *= _shrink(stack, total)[:, None, None]
    return total.mul_(alpha)


def _shrink(stack: Stack, target: Tensor) -> Tensor:
    """(b,) factors ≤ 1 that keep ‖target‖ ≤ γ·(its norm in the last step); a last norm of 0 limits
    nothing."""
    norm, last = torch.linalg.matrix_norm(target), stack.state["previous_norm"]
    limit = stack.options["norm_growth_limit"] * last
    factor = torch.where((last > 0) & (norm > limit), limit / norm, 1.0)
    stack.commit("previous_norm", norm * factor)
    return factor


RULE = Sumo()
