"""Variances of means over rows that depend on each other: rows of a document are one cluster.

Sums of deviations by cluster are independent, which rows are not (Liang and Zeger, Biometrika 73 (1986) 13-22). With
one row in each cluster these are the usual variances. fp64 throughout.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Floats = NDArray[np.float64]
Ids = NDArray[np.int64]


class ClusteredMean(NamedTuple):
    """A mean over rows.

    Attributes:
        mean: over the rows.
        variance: of the mean; NaN for fewer than two clusters.
        clusters: number of them.
    """

    mean: float
    variance: float
    clusters: int

    @property
    def half_width(self) -> float:
        """Return that of the 95 % t-interval over clusters; NaN for fewer than two."""
        if self.clusters < 2:
            return math.nan
        return float(stats.t.ppf(0.975, self.clusters - 1)) * math.sqrt(self.variance)


def clustered_mean(values: Floats, clusters: Ids) -> ClusteredMean:
    """Return the mean of some rows and its variance.

    Args:
        values: (rows,), at least one.
        clusters: (rows,) the document of each.
    """
    mean = float(values.mean())
    _, places = np.unique(clusters, return_inverse=True)
    sums = np.bincount(places, weights=values - mean)
    count = len(sums)
    if count < 2:
        return ClusteredMean(mean, math.nan, count)
    return ClusteredMean(mean, float((sums**2).sum()) / len(values) ** 2 * count / (count - 1), count)


def difference(first: ClusteredMean, second: ClusteredMean) -> tuple[float, float]:
    """Return the difference of two means and the half width of its 95 % interval.

    Degrees of freedom are Satterthwaite's, as in Welch's test.
    """
    variance = first.variance + second.variance
    found = first.mean - second.mean
    if not math.isfinite(variance) or variance == 0:
        return found, variance
    parts = [part.variance**2 / (part.clusters - 1) for part in (first, second)]
    return found, float(stats.t.ppf(0.975, variance**2 / sum(parts))) * math.sqrt(variance)
