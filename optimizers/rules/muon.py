"""Muon: the orthogonalized momentum of the whole matrix (Jordan et al. 2024; Moonlight, arXiv 2502.16982).

M ← μM + (1 - μ)G  or  μM + G      U = look-ahead of M      W ← W - η α s·orth(U)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from optimizers.interfaces import MatrixBatch, Rule, Update
from optimizers.rules.orthogonalize import momentum, orthogonalize, scale


class Muon(Rule):
    """Muon; the orthogonalizer decides between Newton-Schulz, Polar Express and the exact factor."""

    needs_whole: ClassVar[bool] = True

    def update(self, b: MatrixBatch) -> Update:
        """Take one step; see the module's formula."""
        u = momentum(b, b.gradient, overwrites=True)
        o = orthogonalize(u, b.options)
        size = b.options["alpha"] * scale(b.options["update_scale"], b.shape, b.fans, min(b.shape))
        delta = o.factor if size == 1.0 else o.factor * size
        return Update(delta, u, o.factor, o.singular_values, o.fallbacks)

    def state(self, shape: tuple[int, int], options: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        """Return mn numbers."""
        return {"moment": shape}

    def spectrum_of_state(self, options: Mapping[str, Any]) -> bool:
        """Return False with a look-ahead that is not stored."""
        return options["nesterov"] is not True


RULE = Muon()
