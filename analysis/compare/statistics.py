"""Is the difference real? Paired t-tests over common seeds, Holm's correction, and the power that was there.

Arrays are float64 of shape (…, arms, seeds), NaN where a seed is missing in an arm; leading axes are
independent comparisons, so that a simulation of thousands of them runs through the very code that names a
winner.

Sources: Student (1908) for the paired t-test; Holm, "A simple sequentially rejective multiple test
procedure", Scand. J. Statist. 6 (1979) 65-70; power of the t-test by the noncentral t distribution (Johnson &
Kotz 1970).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

Floats = NDArray[np.float64]

ALPHA = 0.05
"""Family-wise error rate of a verdict."""
POWER = 0.80
RESOLUTION = 0.01
"""The difference (nats/token) that "n = … seeds would show" speaks of."""
MAX_SEEDS = 10_000


@dataclass(frozen=True)
class Interval:
    """Mean of ``n`` values, their standard deviation (ddof 1), and the half width of the t-interval.

    ``sd`` and ``half_width`` are NaN for n < 2, ``mean`` too for n = 0.
    """

    n: int
    mean: float
    sd: float
    half_width: float


@dataclass(frozen=True)
class Pairwise:
    """All pairs (i, j), i < j, of arms. Arrays have shape (…, pairs); a difference is loss_i − loss_j."""

    pairs: list[tuple[int, int]]
    n: NDArray[np.int64]
    mean: Floats
    sd: Floats
    half_width: Floats
    """Of the 95 % t-interval of the mean difference, not adjusted for the number of pairs."""
    p: Floats
    """Two-sided; NaN where it can't be tested (n < 2, or differences that don't vary)."""
    p_holm: Floats


def interval(values: ArrayLike, confidence: float = 0.95) -> Interval:
    """Mean and t-interval of the finite entries of a 1-D array."""
    kept = np.asarray(values, float)
    kept = kept[np.isfinite(kept)]
    n = len(kept)
    if n < 2:
        return Interval(n, float(kept[0]) if n else math.nan, math.nan, math.nan)
    sd = float(np.std(kept, ddof=1))
    half = float(stats.t.ppf((1 + confidence) / 2, n - 1)) * sd / math.sqrt(n)
    return Interval(n, float(np.mean(kept)), sd, half)


def holm(p: ArrayLike) -> Floats:
    """Holm-adjusted p-values along the last axis; NaN entries stay NaN but count as hypotheses.

    Counting them keeps the correction as strict as the number of questions that were asked.
    """
    p = np.asarray(p, float)
    m = p.shape[-1]
    filled = np.where(np.isnan(p), np.inf, p)
    order = np.argsort(filled, axis=-1)
    scaled = np.take_along_axis(filled, order, -1) * (m - np.arange(m))
    stepped = np.minimum(np.maximum.accumulate(scaled, axis=-1), 1.0)
    adjusted = np.empty_like(p)
    np.put_along_axis(adjusted, order, stepped, -1)
    return np.where(np.isnan(p), np.nan, adjusted)


def pairwise(losses: ArrayLike, confidence: float = 0.95) -> Pairwise:
    """Paired t-tests between all arms over the seeds that both have.

    Args:
        losses: (…, arms, seeds), NaN where a run is missing.

    Differences that are all equal get no p-value unless they are all zero (p = 1): seeds that repeat each
    other to the last bit are copies of one run, not evidence.
    """
    losses = np.asarray(losses, float)
    pairs = list(combinations(range(losses.shape[-2]), 2))
    first, second = [i for i, _ in pairs], [j for _, j in pairs]
    difference = losses[..., first, :] - losses[..., second, :]
    common = np.isfinite(difference)
    n = common.sum(-1)
    safe_n = np.maximum(n, 1)
    mean = np.where(common, difference, 0.0).sum(-1) / safe_n
    spread = np.where(common, difference - mean[..., None], 0.0)
    freedom = np.maximum(n - 1, 1)
    sd = np.sqrt((spread**2).sum(-1) / freedom)
    # Rounding of the mean leaves differences that are equal a spread of some eps: not a spread.
    varies = sd > 8 * np.finfo(float).eps * np.maximum(np.abs(mean), np.finfo(float).tiny)
    error = sd / np.sqrt(safe_n)
    with np.errstate(divide="ignore", invalid="ignore"):
        p = 2 * stats.t.sf(np.abs(mean) / error, freedom)
    p = np.where(varies, p, np.where(mean == 0, 1.0, np.nan))
    tested = n >= 2
    p = np.where(tested, p, np.nan)
    half = stats.t.ppf((1 + confidence) / 2, freedom) * error
    return Pairwise(
        pairs,
        n,
        np.where(n >= 1, mean, np.nan),
        np.where(tested, sd, np.nan),
        np.where(tested, half, np.nan),
        p,
        holm(p),
    )


def winners(tests: Pairwise, arms: int, *, p: Floats | None = None) -> NDArray[np.int64]:
    """The arm that ends lower than every other at family-wise error ``ALPHA``, or −1: shape (…).

    Args:
        tests: of `pairwise`.
        arms: number of arms.
        p: p-values to decide by instead of the Holm-adjusted ones (for controls).
    """
    p = tests.p_holm if p is None else p
    shown = np.nan_to_num(p, nan=1.0) < ALPHA
    beaten = np.zeros((*shown.shape[:-1], arms), np.int64)
    for index, (i, j) in enumerate(tests.pairs):
        beaten[..., i] += shown[..., index] & (tests.mean[..., index] < 0)
        beaten[..., j] += shown[..., index] & (tests.mean[..., index] > 0)
    best = beaten.argmax(-1)
    return np.where((beaten.max(-1) == arms - 1) & (arms > 1), best, -1)


def power(n: int, difference: float, sd: float, alpha: float = ALPHA) -> float:
    """Chance that a two-sided paired t-test on n pairs shows ``difference`` (sd: of the differences)."""
    if n < 2:
        return 0.0
    if sd == 0:
        return 1.0
    shift = abs(difference) / sd * math.sqrt(n)
    critical = float(stats.t.ppf(1 - alpha / 2, n - 1))
    upper = float(stats.nct.sf(critical, n - 1, shift))
    lower = float(stats.nct.cdf(-critical, n - 1, shift))
    # scipy's noncentral t gives NaN far in the lower tail, where the probability is nil.
    return upper + (lower if math.isfinite(lower) else 0.0)


def seeds_needed(sd: float, difference: float = RESOLUTION, alpha: float = ALPHA) -> int | None:
    """Fewest seeds at which a paired t-test shows ``difference`` with 80 % power; None beyond 10,000 or sd
    unknown.
    """
    if not math.isfinite(sd):
        return None
    if sd == 0:
        return 2
    z = float(stats.norm.ppf(1 - alpha / 2) + stats.norm.ppf(POWER))
    n = max(
        2, math.floor((z * sd / difference) ** 2)
    )  # the normal figure is below the t figure: count up from it
    while n <= MAX_SEEDS:
        if power(n, difference, sd, alpha) >= POWER:
            return n
        n += 1
    return None
