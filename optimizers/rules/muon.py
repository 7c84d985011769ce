"""Muon: the orthogonalized momentum of the whole matrix (Jordan et al. 2024; Moonlight, arXiv 2502.16982).

M ← μM + (1 - μ)G  or  μM + G      U = look-ahead of M      W ← W - η α s·orth(U)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

from optimizers.layouts.rows import Rows
from optimizers.rules.factor import orthogonalize, scale
from optimizers.rules.momentum import momentum
from optimizers.rules.rule import Rule, Update
from optimizers.stacks import Stack


class Muon(Rule):
    """Muon; the orthogonalizer decides between Newton-Schulz, Polar Express and the exact factor."""

    needs_whole: ClassVar[bool] = True

    def state(self, shape: tuple[int, int], options: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        """mn numbers."""
        return {"moment": shape}

    def step(self, stacks: Sequence[Stack], rows: Rows) -> Iterable[Update]:
        """One step of each stack; see the module's formula."""
        for stack in stacks:
            direction = momentum(stack, stack.gradient, overwrites=True)
            found = orthogonalize(direction, stack.options)
            s = scale(stack.options["update_scale"], stack.shape, stack.fans, min(stack.shape))
            size, factor = s * stack.options["alpha"], found.factor
            delta = factor if size == 1.0 else factor * size
            yield Update(delta, direction, factor, found.singular_values, found.fallbacks)

    def spectrum_of_state(self, options: Mapping[str, Any]) -> bool:
        """Not with a look-ahead that is not stored."""
        return options["nesterov"] is not True


RULE = Muon()
