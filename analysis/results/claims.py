"""Estimate what is claimed about an optimizer from runs, each with a 95 % interval and one of three outcomes.

A claim is *supported* if its whole interval is on the claim's side, *not supported* if the whole interval is on the
other side, and *open* otherwise. Sources: Student (1908) for paired differences; the parametric bootstrap (Efron &
Tibshirani 1993) for ranges of learning rates.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from numpy.typing import ArrayLike, NDArray

from analysis.comparison import statistics

Floats = NDArray[np.float64]
Losses = tuple[ArrayLike, ArrayLike]
"""Steps of the evaluations and their losses."""
TOLERANCE = 0.02
"""Nats/token above the best within which a learning rate is as good."""
SPIKE_WINDOW = 16
SPIKE_SIGMAS, SPIKE_NATS = 6.0, 0.1
RESAMPLES, SEED = 2000, 2026


class Outcome(StrEnum):
    """What runs say about a claim."""

    SUPPORTED = "supported"
    NOT_SUPPORTED = "not supported"
    OPEN = "open"


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95 % interval; the interval is NaN with fewer than two values.

    Attributes:
        n: number of pairs, or of values.
    """

    value: float
    low: float
    high: float
    n: int

    def outcome(self, threshold: float = 0.0) -> Outcome:
        """Return what the interval says about "above ``threshold``"."""
        if self.low > threshold:
            return Outcome.SUPPORTED
        return Outcome.NOT_SUPPORTED if self.high < threshold else Outcome.OPEN


def mean_of(values: ArrayLike) -> Estimate:
    """Return the mean of the finite values with Student's interval; values that are all equal have none.

    Equal values do not show that others would be equal, too: no interval is as good as its deviation of zero says.
    """
    found = statistics.interval(values)
    if found.n < 2 or found.sd <= 8 * np.finfo(float).eps * abs(found.mean):
        return Estimate(found.mean, math.nan, math.nan, found.n)
    return Estimate(found.mean, found.mean - found.half_width, found.mean + found.half_width, found.n)


def difference(first: Mapping[int, float], second: Mapping[int, float]) -> Estimate:
    """Return the mean of first − second over common seeds."""
    return mean_of([first[seed] - second[seed] for seed in sorted(first.keys() & second.keys())])


def step_ratio(first: Mapping[int, Losses], second: Mapping[int, Losses]) -> Estimate:
    """Return how many times as many steps ``second`` needs as ``first``, geometric mean over common seeds.

    For each seed it is the ratio of the steps to the worse of the two final losses, which both runs reach: if ``first``
    ends lower, the steps of ``second`` to its end over those of ``first`` to that loss. Exchanging the two gives the
    reciprocal. Losses between evaluations are interpolated. The interval is Student's of the logarithms.
    """
    logs = []
    for seed in sorted(first.keys() & second.keys()):
        curves = [_finite(curve) for curve in (first[seed], second[seed])]
        if all(len(losses) for _, losses in curves):
            target = max(float(losses[-1]) for _, losses in curves)
            steps = [_reaching(*curve, target) for curve in curves]
            logs.append(math.log(steps[1] / steps[0]) if min(steps) > 0 else math.nan)
    found = mean_of(logs)
    return Estimate(math.exp(found.value), math.exp(found.low), math.exp(found.high), found.n)


def _finite(curve: Losses) -> tuple[Floats, Floats]:
    steps, losses = (np.asarray(part, float) for part in curve)
    kept = np.isfinite(losses)
    return steps[kept], losses[kept]


def _reaching(steps: Floats, losses: Floats, target: float) -> float:
    """Return where the losses first are at most ``target``, which the last one is; interpolated linearly."""
    i = int(np.flatnonzero(losses <= target)[0])
    if i == 0:
        return float(steps[0])
    share = (losses[i - 1] - target) / (losses[i - 1] - losses[i])
    return float(steps[i - 1] + share * (steps[i] - steps[i - 1]))


def count_spikes(losses: ArrayLike) -> int:
    """Return the number of spikes in a training loss that has a value for every step.

    A spike is a stretch of steps whose loss is above the median of the 16 steps before it by more than 6 robust
    standard deviations (1.4826 × the median absolute deviation) and by more than 0.1 nats. A loss that is not finite is
    one.
    """
    values = np.asarray(losses, float)
    is_high = np.zeros(len(values), bool)
    for t in range(SPIKE_WINDOW, len(values)):
        before = values[t - SPIKE_WINDOW : t]
        before = before[np.isfinite(before)]
        if not len(before) or not math.isfinite(values[t]):
            is_high[t] = True
            continue
        median = np.median(before)
        sigma = 1.4826 * np.median(np.abs(before - median))
        is_high[t] = values[t] - median > max(SPIKE_SIGMAS * sigma, SPIKE_NATS)
    return int(is_high[0]) + int((is_high[1:] & ~is_high[:-1]).sum())


@dataclass(frozen=True)
class RateRange:
    """How wide the range of learning rates within the tolerance of the best loss is, in factors of two.

    Attributes:
        width: linear between the tried rates; NaN if no loss is finite.
        inner: from the lowest to the highest tried rate within the tolerance: it is at least as wide.
        outer: between the next tried rates on both sides, which are outside: it is at most as wide. Infinite if nothing
            was tried beyond.
    """

    width: float
    inner: float
    outer: float


def rate_range(rates: ArrayLike, losses: ArrayLike, tolerance: float = TOLERANCE) -> RateRange:
    """Return the range of learning rates around the best one whose loss is within ``tolerance`` of it.

    Args:
        rates: tried, in any order.
        losses: final ones; not finite where a trial diverged.
        tolerance: nats/token.
    """
    order = np.argsort(np.asarray(rates, float))
    x, y = np.log2(np.asarray(rates, float)[order]), np.asarray(losses, float)[order]
    y = np.where(np.isfinite(y), y, np.inf)
    if not np.isfinite(y).any():
        return RateRange(math.nan, math.nan, math.nan)
    best = int(np.argmin(y))
    limit = y[best] + tolerance
    width = inner = outer = 0.0
    for step, last in ((-1, 0), (1, len(x) - 1)):
        i = best
        while i != last and y[i + step] <= limit:
            i += step
        reached = abs(x[i] - x[best])
        inner += reached
        if i == last:
            width, outer = width + reached, math.inf
        else:
            gap = abs(x[i + step] - x[i])
            share = (limit - y[i]) / (y[i + step] - y[i]) if np.isfinite(y[i + step]) else 0.0
            width, outer = width + reached + share * gap, outer + reached + gap
    return RateRange(float(width), float(inner), float(outer))


def wider_range(
    first: Losses, second: Losses, sd: float, tolerance: float = TOLERANCE, resamples: int = RESAMPLES
) -> Estimate:
    """Return by how many factors of two the range of rates of ``first`` is wider than that of ``second``.

    The value is that of the lines between the tried rates. Where a range ends between two of these is not known, and
    each trial has one seed. So the lower bound is the 2.5 % quantile of the least difference, inner − outer, of trials
    with normal noise of the deviation ``sd``, that of runs which differ in their seed; the upper bound likewise.
    Differences below about twice the distance of the rates are therefore open.

    Args:
        first: rates and final losses of the trials.
        second: likewise.
        sd: nats/token.
        tolerance: as for `rate_range`.
        resamples: of the bootstrap.
    """
    value = rate_range(*first, tolerance).width - rate_range(*second, tolerance).width
    if not (math.isfinite(value) and math.isfinite(sd)):
        return Estimate(value, math.nan, math.nan, 1)
    rng = np.random.default_rng(SEED)
    draws = np.empty((resamples, 2))
    for i in range(resamples):
        noisy = [
            rate_range(
                rates, np.asarray(losses, float) + rng.normal(0, sd, len(np.asarray(losses))), tolerance
            )
            for rates, losses in (first, second)
        ]
        draws[i] = noisy[0].inner - noisy[1].outer, noisy[0].outer - noisy[1].inner
    # Quantiles that are draws: between an infinite and a finite one there is nothing to interpolate.
    low = float(np.percentile(draws[:, 0], 2.5, method="lower"))
    high = float(np.percentile(draws[:, 1], 97.5, method="higher"))
    return Estimate(value, low, high, 1)
