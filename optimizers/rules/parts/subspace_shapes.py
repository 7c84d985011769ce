"""Shapes and traffic of a subspace and its moment, from the shape of a matrix and the options of its rule. No torch."""

from __future__ import annotations

import math
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


def contracted(left: bool) -> int:
    """Return the axis that Q contracts, which is also the one that its rows run along."""
    return 0 if left else 1


def rank_of(shape: tuple[int, int], options: Mapping[str, Any]) -> int:
    """Return r: the option, or a quarter of the short side."""
    rank = options["rank"]
    return default_rank(*shape) if rank is None else rank


def subspace_state(shape: tuple[int, int], options: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of "basis" (m×r or n×r), or of the "columns" (r) of a DCT basis, and of "moment".

    The moment is r×n or m×r; with `residual` unbiased it is m×n, which low-rank periods use a part of.
    """
    (m, n), r = shape, rank_of(shape, options)
    left = keeps_left(shape, options["side"])
    basis = {"columns": (r,)} if options["basis"] == "dct" else {"basis": (m if left else n, r)}
    moment = (r, n) if left else (m, r)
    return {**basis, "moment": shape if options["residual"] == "unbiased" else moment}


def subspace_axes(shape: tuple[int, int], options: Mapping[str, Any]) -> dict[str, Axes]:
    """Return which axis of the matrix (0 rows, 1 columns) each dimension of `subspace_state` runs along."""
    left = keeps_left(shape, options["side"])
    moment = (None, 1) if left else (0, None)
    return {
        "basis": (contracted(left), None),
        "columns": (None,),
        "moment": (0, 1) if options["residual"] == "unbiased" else moment,
    }


def step_traffic(shape: tuple[int, int], split: int, options: Mapping[str, Any], ranks: int) -> float:
    """Return the bytes that a rank sends in an ordinary step for one matrix that is split along an axis.

    Infinite with `residual` unbiased, whose full-rank periods have no row form.
    """
    if options["residual"] == "unbiased":
        return math.inf
    left, r, share = keeps_left(shape, options["side"]), rank_of(shape, options), (ranks - 1) / ranks
    is_contracted = split == contracted(left)
    kept = shape[1 - split] if is_contracted else shape[split]
    total = 0.0
    if is_contracted:
        total += 8.0 * r * kept * share  # all-reduce of Ĝ
    elif options["inner"] == "orthogonalize":
        total += min(12.0 * r * r, 8.0 * kept * r / ranks) * share
    return total + _frequent_refreshes(shape, split, options) * share


def _frequent_refreshes(shape: tuple[int, int], split: int, options: Mapping[str, Any]) -> float:
    """Return the part of a refresh that falls on each step, for the bases that are meant to change in every step."""
    r, interval = rank_of(shape, options), options["refresh_interval"]
    is_contracted = split == contracted(keeps_left(shape, options["side"]))
    other = shape[1 - split]
    if options["basis"] == "dct":
        # All coefficients where their sums run over ranks, else one energy of each DCT column.
        return (8.0 * shape[0] * shape[1] if is_contracted else 16.0 * other) / interval
    if options["basis"] == "power":
        # The two products of a block power iteration, and Grams.
        return (8.0 * r * other + (32.0 * r * r if is_contracted else 0.0)) / interval
    return 0.0
