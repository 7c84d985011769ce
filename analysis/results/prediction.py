"""How well an early figure of a submission predicts a late one: rank correlation with its interval.

Sources: Spearman (1904); the BCa bootstrap interval (Efron, J. Am. Stat. Assoc. 82 (1987) 171-185), of scipy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

Floats = NDArray[np.float64]
RESAMPLES = 4000
SEED = 2026
"""Of the bootstrap, so that a page is the same each time."""


@dataclass(frozen=True)
class Correlation:
    """A correlation over ``n`` items with its 95 % interval; NaN for fewer than four items."""

    n: int
    value: float
    low: float
    high: float


def rank_correlation(first: ArrayLike, second: ArrayLike, resamples: int = RESAMPLES) -> Correlation:
    """Return Spearman's correlation with the BCa interval of items that are resampled in pairs.

    Args:
        first: shape (items,); items with a NaN in either are left out.
        second: likewise.
        resamples: of the bootstrap.
    """
    table = np.column_stack([np.asarray(first, float), np.asarray(second, float)])
    x, y = table[np.isfinite(table).all(1)].T
    if len(x) < 4:
        return Correlation(len(x), math.nan, math.nan, math.nan)
    found = stats.bootstrap(
        (x, y),
        _spearman,
        paired=True,
        vectorized=True,
        n_resamples=resamples,
        batch=500,
        method="BCa",
        rng=np.random.default_rng(SEED),
    ).confidence_interval
    return Correlation(len(x), float(_spearman(x, y)), float(found.low), float(found.high))


def _spearman(x: Floats, y: Floats, axis: int = -1) -> Floats:
    """Return the correlation of the ranks along an axis; 0 where a resample holds one value only."""
    a, b = (stats.rankdata(values, axis=axis) for values in (x, y))
    a, b = a - a.mean(axis, keepdims=True), b - b.mean(axis, keepdims=True)
    scale = np.sqrt((a * a).sum(axis) * (b * b).sum(axis))
    return np.divide((a * b).sum(axis), scale, out=np.zeros_like(scale), where=scale > 0)


def within_arms(pairs: Sequence[tuple[ArrayLike, ArrayLike]]) -> Correlation:
    """Return Pearson's correlation of deviations from the means of their arms, with Fisher's interval.

    The means take one degree of freedom of each arm: the interval is that of N − arms + 1 independent pairs.

    Args:
        pairs: of each arm, two figures of its runs.
    """
    first, second, freedom = [], [], 0
    for x, y in pairs:
        table = np.column_stack([np.asarray(x, float), np.asarray(y, float)])
        table = table[np.isfinite(table).all(1)]
        if len(table) > 1:
            first.append(table[:, 0] - table[:, 0].mean())
            second.append(table[:, 1] - table[:, 1].mean())
            freedom += len(table) - 1
    if freedom < 4:
        return Correlation(freedom, math.nan, math.nan, math.nan)
    r = float(np.corrcoef(np.concatenate(first), np.concatenate(second))[0, 1])
    half = float(stats.norm.ppf(0.975)) / math.sqrt(freedom + 1 - 3)
    return Correlation(freedom, r, math.tanh(math.atanh(r) - half), math.tanh(math.atanh(r) + half))
