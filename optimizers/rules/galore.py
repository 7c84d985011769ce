"""GaLore: Adam on the gradient's coordinates in a subspace (arXiv 2403.03507).

Ĝ = GQ   M ← β₁M + (1 - β₁)Ĝ   V ← β₂V + (1 - β₂)Ĝ²   W ← W - η α (√b₂/b₁) (M / (√V + ε)) Qᵀ,  bᵢ = 1 - βᵢᵗ
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from optimizers.interfaces import Axes, MatrixBatch, Rule, Steps, Update
from optimizers.rules.subspace import (
    lift,
    project,
    projection_traffic,
    rank_of,
    refresh,
    subspace_axes,
    subspace_state,
)


class GaLore(Rule):
    """GaLore as galore-torch computes it (`std`: the moment keeps the long side; no transport at a refresh)."""

    needs_whole: ClassVar[bool] = False

    def update(self, b: MatrixBatch) -> Steps[Update]:
        """Take one step; see the module's formula."""
        yield from refresh(b)
        g = yield project(b)
        return Update(lift(b, adam(b, g)))

    def state(self, shape: tuple[int, int], options: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        """Return r·short numbers for the basis and 2·r·long for the moments (side "long")."""
        state = subspace_state(shape, options)
        return {**state, "second_moment": state["moment"]}

    def axes(self, shape: tuple[int, int], options: Mapping[str, Any]) -> dict[str, Axes]:
        """Return the axes of basis and moments, which lie alike."""
        axes = subspace_axes(shape, options)
        return {**axes, "second_moment": axes["moment"]}

    def factors(self, shape: tuple[int, int], options: Mapping[str, Any]) -> tuple[int, float] | None:
        """Return the rank; nothing of the gradient outside of the subspace is kept."""
        return rank_of(shape, options), 0.0

    def row_traffic(
        self, shape: tuple[int, int], split: int, options: Mapping[str, Any], ranks: int
    ) -> float:
        """Return the bytes of Ĝ, or nothing where the moments keep the axis that is split."""
        return projection_traffic(shape, split, options, ranks)


def adam(b: MatrixBatch, gradient: Tensor) -> Tensor:
    """Advance both moments by a projected gradient; return α·M̂/(√V̂ + ε), for `eps_form` raw with ε before bias
    correction."""
    (beta1, beta2), eps = b.options["betas"], b.options["eps"]
    first = b.blend("moment", gradient, beta1, 1.0 - beta1)
    second = b.blend("second_moment", gradient.square(), beta2, 1.0 - beta2)
    bias1, bias2 = 1.0 - beta1**b.count, (1.0 - beta2**b.count).sqrt()
    # (√b₂/b₁)·M/(√V + ε') is M̂/(√V̂ + ε) for ε' = ε√b₂, and the raw form for ε' = ε.
    size = (b.options["alpha"] * bias2 / bias1).to(first.dtype)
    floor = eps if b.options["eps_form"] == "raw" else (eps * bias2).to(first.dtype)
    return first.div(second.sqrt().add_(floor)).mul_(size)


RULE = GaLore()
