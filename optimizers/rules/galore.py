"""GaLore: Adam on the gradient's coordinates in a subspace (arXiv 2403.03507).

Ĝ = GQ   M ← β₁M + (1 - β₁)Ĝ   V ← β₂V + (1 - β₂)Ĝ²   W ← W - η α (√b₂/b₁) (M / (√V + ε)) Qᵀ,  bᵢ = 1 - βᵢᵗ
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor

from optimizers.layouts.rows import Rows
from optimizers.rules.rule import Rule, Update
from optimizers.rules.subspace import (
    keeps_left,
    lifted,
    projected,
    projection_traffic,
    rank_of,
    refresh,
    subspace_axes,
    subspace_state,
)
from optimizers.stacks import Axes, Stack


class GaLore(Rule):
    """GaLore as galore-torch computes it (`std`: the moment keeps the long side; no transport at a
    refresh)."""

    needs_whole: ClassVar[bool] = False

    def state(self, shape: tuple[int, int], options: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        """r·short for the basis and 2·r·long for the moments (side "long")."""
        state = subspace_state(shape, options)
        return {**state, "second_moment": state["moment"]}

    def axes(self, shape: tuple[int, int], options: Mapping[str, Any]) -> dict[str, Axes]:
        """The second moment lies as the first."""
        axes = subspace_axes(shape, options)
        return {**axes, "second_moment": axes["moment"]}

    def factors(self, shape: tuple[int, int], options: Mapping[str, Any]) -> tuple[int, float] | None:
        """Nothing of the gradient outside of the subspace."""
        return rank_of(shape, options), 0.0

    def row_traffic(
        self, shape: tuple[int, int], split: int, options: Mapping[str, Any], ranks: int
    ) -> float:
        """Ĝ, or nothing at all where the moments keep the axis that is split."""
        return projection_traffic(shape, split, options, ranks)

    def step(self, stacks: Sequence[Stack], rows: Rows) -> Iterable[Update]:
        """One step of each stack; see the module's formula."""
        refresh(stacks, rows)
        lefts = [keeps_left(s.shape, s.options["side"]) for s in stacks]
        for s, left, g in zip(stacks, lefts, projected(stacks, lefts, rows)):
            yield Update(lifted(s.state["basis"], normalized(s, g), left))


def normalized(stack: Stack, gradient: Tensor) -> Tensor:
    """Advance both moments by a projected gradient; returns α·M̂/(√V̂ + ε), with ε before bias correction for
    `eps_form` raw."""
    (beta1, beta2), eps = stack.options["betas"], stack.options["eps"]
    first = stack.blend("moment", gradient, beta1, 1.0 - beta1)
    second = stack.blend("second_moment", gradient.square(), beta2, 1.0 - beta2)
    bias1, bias2 = 1.0 - beta1**stack.count, (1.0 - beta2**stack.count).sqrt()
    # (√b₂/b₁)·M/(√V + ε') is M̂/(√V̂ + ε) for ε' = ε√b₂, and the raw form for ε' = ε.
    size = (stack.options["alpha"] * bias2 / bias1).to(first.dtype)
    floor = eps if stack.options["eps_form"] == "raw" else (eps * bias2).to(first.dtype)
    return first.div(second.sqrt().add_(floor)).mul_(size)


RULE = GaLore()
