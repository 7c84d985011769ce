"""Shapes, axes and traffic of low-rank rules, from shapes and options alone. Nothing here imports torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from optimizers.rule import Axes


def default_rank(rows: int, columns: int) -> int:
    """Rank where `rank` is null: a quarter of the short side (GaLore's choice at most sizes), at least 1."""
    return max(1, min(rows, columns) // 4)


def keeps_left(shape: tuple[int, int], side: str) -> bool:
    """Return True if Q multiplies from the left (Ĝ = QᵀG, r×n) rather than from the right (Ĝ = GQ, m×r).

    "short": the moment keeps the short side; square: from the left. "long": the long side; square: from the
    right.
    """
    m, n = shape
    return m >= n if side == "short" else m < n


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


def limits_growth(options: Mapping[str, Any], target: str) -> bool:
    """Return True if `norm_growth_limit` bounds this target: "factor", "residual" or "total"."""
    if options["norm_growth_limit"] is None or options["norm_growth_target"] != target:
        return False
    return target != "residual" or bool(options["residual_scale"])
