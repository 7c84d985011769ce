"""How much the results of runs that differ only in their seed vary: pooled over arms, and arm by arm.

The intervals assume normal results. Sources: the χ² interval of a variance; Brown & Forsythe, J. Am. Stat. Assoc. 69
(1974) 364-367, for equal spreads.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from analysis.comparison.statistics import holm

Floats = NDArray[np.float64]
WIDE = 0.01
"""Family-wise error at which an arm is said to vary more than the others."""


@dataclass(frozen=True)
class SeedSpread:
    """A standard deviation with its degrees of freedom and its 95 % interval; NaN without degrees of freedom."""

    sd: float
    freedom: int
    low: float
    high: float


def pooled(samples: Sequence[ArrayLike], confidence: float = 0.95) -> SeedSpread:
    """Return the standard deviation within samples, pooled over them, with its χ² interval."""
    arrays = [np.asarray(sample, float) for sample in samples]
    freedom = sum(max(len(sample) - 1, 0) for sample in arrays)
    if not freedom:
        return SeedSpread(math.nan, 0, math.nan, math.nan)
    squares = sum(float(((sample - sample.mean()) ** 2).sum()) for sample in arrays if len(sample) > 1)
    low, high = stats.chi2.ppf([(1 + confidence) / 2, (1 - confidence) / 2], freedom)
    return SeedSpread(
        math.sqrt(squares / freedom), freedom, math.sqrt(squares / low), math.sqrt(squares / high)
    )


def equal_spreads(samples: Sequence[ArrayLike]) -> float:
    """Return the p-value of Brown and Forsythe's test that all samples vary alike; NaN for fewer than two samples."""
    kept = [np.asarray(sample, float) for sample in samples if len(np.asarray(sample)) > 2]
    return float(stats.levene(*kept, center="median").pvalue) if len(kept) > 1 else math.nan


def wide_arms(samples: Mapping[str, ArrayLike]) -> dict[str, tuple[float, float]]:
    """Return the arms that vary more than the others pooled, with ratio and Holm-adjusted p (one-sided F-test).

    A spread above that of seeds says that the runs of an arm differ in more than the seed, or that it is unstable.
    """
    arrays = {name: np.asarray(sample, float) for name, sample in samples.items()}
    arrays = {name: sample for name, sample in arrays.items() if len(sample) > 2}
    if len(arrays) < 2:
        return {}
    ratios, p = [], []
    for name, sample in arrays.items():
        others = pooled([other for key, other in arrays.items() if key != name])
        variance = float(np.var(sample, ddof=1))
        ratio = math.sqrt(variance) / others.sd if others.sd > 0 else math.nan
        ratios.append(ratio)
        p.append(float(stats.f.sf(ratio**2, len(sample) - 1, others.freedom)))
    adjusted = holm(p)
    return {
        name: (ratio, float(p))
        for name, ratio, p in zip(arrays, ratios, adjusted, strict=True)
        if np.nan_to_num(p, nan=1.0) < WIDE
    }
