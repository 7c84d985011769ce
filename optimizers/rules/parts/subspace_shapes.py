"""Shapes of a subspace and its moment, from the shape of a matrix and the options of its rule. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from optimizers.rule import Axes


def default_rank(rows: int, columns: int) -> int:
    """Return the rank where `rank` is null: a quarter of the short side (GaLore's choice at most sizes), at least 1."""
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
