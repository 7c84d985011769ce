"""Test whether a difference is real: t-tests over common seeds or between samples, Holm's correction, power.

The results of a task also vary with its validation examples: `with_examples` adds that variance (`two_level`).

Arrays are float64 of shape (…, arms, seeds), NaN where an arm lacks a seed. Leading axes are independent
comparisons, so that a simulation of thousands of them uses the same code that names a winner.

Sources: Student (1908) for the paired t-test; Welch, Biometrika 34 (1947) 28-35, for samples without common seeds;
Holm, "A simple sequentially rejective multiple test procedure", Scand. J. Statist. 6 (1979) 65-70; power of the
t-test by the noncentral t distribution (Johnson & Kotz 1970); degrees of freedom of a sum of variances:
Satterthwaite, Biometrics Bulletin 2 (1946) 110-114; variances of a mean over seeds × examples: Owen, "The pigeonhole
bootstrap", Ann. Appl. Stat. 1 (2007) 386-411.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

Floats = NDArray[np.float64]

ALPHA = 0.05
"""Family-wise error rate of a verdict."""
POWER = 0.80
RESOLUTION = 0.01
"""Difference (nats/token, or a point of a metric) for which the number of seeds is given."""
MAX_SEEDS = 10_000


@dataclass(frozen=True)
class Interval:
    """Mean of ``n`` values, their standard deviation (ddof 1), and the half width of the t-interval.

    ``sd`` and ``half_width`` are NaN for n < 2, ``mean`` is NaN for n = 0.
    """

    n: int
    mean: float
    sd: float
    half_width: float


@dataclass(frozen=True)
class Pairwise:
    """Paired differences result_i − result_j of all pairs i < j of arms; arrays have shape (…, pairs)."""

    pairs: list[tuple[int, int]]
    n: NDArray[np.int64]
    mean: Floats
    sd: Floats
    half_width: Floats
    """Half width of the 95 % interval of the mean difference, not adjusted for the number of pairs."""
    p: Floats
    """Two-sided p-value; NaN if it cannot be tested (n < 2, or differences that do not vary)."""
    p_holm: Floats
    paired: bool = True
    """False for `welch`: then ``n`` is the smaller of the two numbers of runs."""


def interval(values: ArrayLike, confidence: float = 0.95) -> Interval:
    """Return mean and t-interval of the finite entries of a 1-D array."""
    kept = np.asarray(values, float)
    kept = kept[np.isfinite(kept)]
    n = len(kept)
    if n < 2:
        return Interval(n, float(kept[0]) if n else math.nan, math.nan, math.nan)
    sd = float(np.std(kept, ddof=1))
    half = float(stats.t.ppf((1 + confidence) / 2, n - 1)) * sd / math.sqrt(n)
    return Interval(n, float(np.mean(kept)), sd, half)


def holm(p: ArrayLike) -> Floats:
    """Return Holm-adjusted p-values along the last axis; NaN entries stay NaN but count as hypotheses.

    Counting them keeps the correction as strict as the number of tests that were intended.
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


def pairwise(results: ArrayLike, confidence: float = 0.95) -> Pairwise:
    """Compute paired t-tests between all arms over the seeds that both have.

    Differences that are all equal have no p-value, except that p = 1 if all are zero: bit-equal seeds are copies
    of one run and no evidence.

    Args:
        results: shape (…, arms, seeds), NaN where a run is missing.
        confidence: of the intervals.
    """
    results = np.asarray(results, float)
    pairs = list(combinations(range(results.shape[-2]), 2))
    first, second = [i for i, _ in pairs], [j for _, j in pairs]
    difference = results[..., first, :] - results[..., second, :]
    common = np.isfinite(difference)
    n = common.sum(-1)
    safe_n = np.maximum(n, 1)
    mean = np.where(common, difference, 0.0).sum(-1) / safe_n
    spread = np.where(common, difference - mean[..., None], 0.0)
    freedom = np.maximum(n - 1, 1)
    sd = np.sqrt((spread**2).sum(-1) / freedom)
    # Equal differences have a spread of some eps from rounding of their mean: that is not a variation.
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


def welch(results: ArrayLike, confidence: float = 0.95) -> Pairwise:
    """Compute Welch's t-tests between all arms, whose runs share no seeds; scipy's ``ttest_ind`` does the tests.

    ``sd`` is that of the difference of one run of each arm, √(s₁² + s₂²). As in `pairwise`, there is no test with fewer
    than two runs of an arm, or where no run varies.

    Args:
        results: shape (arms, runs), NaN where an arm has fewer runs.
        confidence: of the intervals.
    """
    samples = [row[np.isfinite(row)] for row in np.asarray(results, float)]
    pairs = list(combinations(range(len(samples)), 2))
    columns = np.full((5, len(pairs)), np.nan)
    for k, (i, j) in enumerate(pairs):
        first, second = samples[i], samples[j]
        n = min(len(first), len(second))
        columns[0, k] = n
        if n:
            columns[1, k] = first.mean() - second.mean()
        if n < 2:
            continue
        columns[2, k] = math.hypot(first.std(ddof=1), second.std(ddof=1))
        scale = max(abs(first.mean()), abs(second.mean()), np.finfo(float).tiny)
        if columns[2, k] <= 8 * np.finfo(float).eps * scale:
            columns[3, k] = 0.0
            columns[4, k] = 1.0 if columns[1, k] == 0 else math.nan
            continue
        test = stats.ttest_ind(first, second, equal_var=False)
        columns[3, k] = test.confidence_interval(confidence).high - columns[1, k]
        columns[4, k] = test[1]
    n, mean, sd, half, p = columns
    return Pairwise(pairs, n.astype(np.int64), mean, sd, half, p, holm(p), paired=False)


@dataclass(frozen=True)
class ExampleVariance:
    """Variance of the mean over seeds of a result (or a difference) that the choice of examples causes; shape (…)."""

    shared: Floats
    """Variance over resampled examples of the mean over seeds: σ²(example)/N + σ²(seed × example)/(S·N)."""
    single: Floats
    """Mean over seeds of the same for one seed: σ²(example)/N + σ²(seed × example)/N."""
    examples: int


def two_level(
    n: ArrayLike, mean: ArrayLike, sd: ArrayLike, variance: ExampleVariance, confidence: float = 0.95
) -> tuple[Floats, Floats]:
    """Return half width and p-value of a mean over S seeds and N examples, both of which are samples.

    With V_seed = sd²/S, which estimates σ²(seed)/S + σ²(seed × example)/(S·N), the variance is
    V = V_seed + V_example − V_both, where V_both = (single − shared)/(S − 1) estimates the last term, which the first
    two both hold; V is at least the larger of them. Its quantile is that of t with Satterthwaite's degrees of freedom.
    Those are unreliable for two or three seeds with large effects, so that the result is never narrower, and p never
    smaller, than by the seeds alone.

    Args:
        n: number of seeds S.
        mean: over the seeds.
        sd: standard deviation over the seeds (ddof 1).
        variance: of the examples.
        confidence: of the interval.

    Returns:
        Arrays of shape (…), NaN for S < 2 or unknown variances; p is NaN where the seeds' values do not vary.
    """
    n, mean, sd = np.asarray(n), np.asarray(mean, float), np.asarray(sd, float)
    freedom = np.maximum(n - 1, 1)
    by_seed = sd**2 / np.maximum(n, 1)
    both = np.maximum(variance.single - variance.shared, 0) / freedom
    total = np.maximum(by_seed + variance.shared - both, np.maximum(by_seed, variance.shared))
    with np.errstate(divide="ignore", invalid="ignore"):
        parts = by_seed**2 / freedom + variance.shared**2 / max(variance.examples - 1, 1)
        total_freedom = np.where(parts > 0, total**2 / parts, freedom)
        quantile = (1 + confidence) / 2
        half = np.maximum(
            stats.t.ppf(quantile, total_freedom) * np.sqrt(total),
            stats.t.ppf(quantile, freedom) * np.sqrt(by_seed),
        )
        p = np.maximum(
            2 * stats.t.sf(np.abs(mean) / np.sqrt(total), total_freedom),
            2 * stats.t.sf(np.abs(mean) / np.sqrt(by_seed), freedom),
        )
    tested = (n >= 2) & np.isfinite(total)
    return np.where(tested, half, np.nan), np.where(tested, p, np.nan)


def with_examples(tests: Pairwise, variance: ExampleVariance) -> Pairwise:
    """Return the tests with intervals and p-values over seeds and examples (`two_level`), adjusted by Holm.

    Args:
        tests: result of `pairwise`.
        variance: of the examples, shape (…, pairs).
    """
    half, p = two_level(tests.n, tests.mean, tests.sd, variance)
    # Seeds that repeat each other stay untested, as without examples.
    p = np.where(np.isnan(tests.p) | (tests.p == 1), tests.p, p)
    return replace(tests, half_width=half, p=p, p_holm=holm(p))


def winners(tests: Pairwise, arms: int, *, sign: int = -1, p: Floats | None = None) -> NDArray[np.int64]:
    """Return the arm that ends better than every other at family-wise error ``ALPHA``, or −1; shape (…).

    Args:
        tests: result of `pairwise`.
        arms: number of arms.
        sign: −1 where lower results are better, 1 where higher ones are.
        p: p-values to use in place of the Holm-adjusted ones (for controls).
    """
    p = tests.p_holm if p is None else p
    is_significant = np.nan_to_num(p, nan=1.0) < ALPHA
    beaten = np.zeros((*is_significant.shape[:-1], arms), np.int64)
    for index, (i, j) in enumerate(tests.pairs):
        beaten[..., i] += is_significant[..., index] & (sign * tests.mean[..., index] > 0)
        beaten[..., j] += is_significant[..., index] & (sign * tests.mean[..., index] < 0)
    best = beaten.argmax(-1)
    return np.where((beaten.max(-1) == arms - 1) & (arms > 1), best, -1)


def examples_needed(variance: ExampleVariance, difference: float = RESOLUTION) -> int | None:
    """Return the examples for which ``difference`` is detected with 80 % power, were the seeds many (normal quantiles).

    Args:
        variance: of the pairs of arms at the present number of examples; the largest counts.
        difference: true mean difference.

    Returns:
        None if it is unknown or nothing varies.
    """
    known = variance.shared[np.isfinite(variance.shared)]
    if not len(known) or not known.max():
        return None
    pairs = len(variance.shared)
    z = float(stats.norm.ppf(1 - ALPHA / 2 / pairs) + stats.norm.ppf(POWER))
    return math.ceil(variance.examples * float(known.max()) * (z / difference) ** 2)


def power(n: int, difference: float, sd: float, alpha: float = ALPHA) -> float:
    """Return the power of a two-sided paired t-test on n pairs for a true mean ``difference``.

    Args:
        n: number of pairs.
        difference: true mean difference.
        sd: standard deviation of the differences.
        alpha: significance level.
    """
    if n < 2:
        return 0.0
    if sd == 0:
        return 1.0
    return _power_of_t(abs(difference) / sd * math.sqrt(n), n - 1, alpha)


def power_of_two_samples(n: int, difference: float, sd: float, alpha: float = ALPHA) -> float:
    """Return the power of a two-sided t-test between two samples of n runs with one standard deviation.

    Args:
        n: runs of each arm.
        difference: true mean difference.
        sd: standard deviation of a run.
        alpha: significance level.
    """
    if n < 2:
        return 0.0
    if sd == 0:
        return 1.0
    return _power_of_t(abs(difference) / sd * math.sqrt(n / 2), 2 * (n - 1), alpha)


def _power_of_t(shift: float, freedom: int, alpha: float) -> float:
    """Return the power of a two-sided t-test whose statistic is noncentral t with ``shift``."""
    critical = float(stats.t.ppf(1 - alpha / 2, freedom))
    lower = float(stats.nct.cdf(-critical, freedom, shift))
    # scipy's noncentral t gives NaN far in the lower tail, where the probability is nil.
    return float(stats.nct.sf(critical, freedom, shift)) + (lower if math.isfinite(lower) else 0.0)


def runs_needed(sd: float, difference: float, alpha: float = ALPHA) -> int | None:
    """Return the fewest runs of each arm with which `power_of_two_samples` is 80 %; None for more than 10,000."""
    z = float(stats.norm.ppf(1 - alpha / 2) + stats.norm.ppf(POWER))
    n = max(2, math.floor(2 * (z * sd / difference) ** 2))
    while n <= MAX_SEEDS:
        if power_of_two_samples(n, difference, sd, alpha) >= POWER:
            return n
        n += 1
    return None


def seeds_needed(sd: float, difference: float = RESOLUTION, alpha: float = ALPHA) -> int | None:
    """Return the fewest seeds for which a paired t-test detects ``difference`` with 80 % power.

    Returns:
        None if more than 10,000 seeds are needed or ``sd`` is unknown.
    """
    if not math.isfinite(sd):
        return None
    if sd == 0:
        return 2
    z = float(stats.norm.ppf(1 - alpha / 2) + stats.norm.ppf(POWER))
    # The normal approximation is below the exact number: count up from it.
    n = max(2, math.floor((z * sd / difference) ** 2))
    while n <= MAX_SEEDS:
        if power(n, difference, sd, alpha) >= POWER:
            return n
        n += 1
    return None
