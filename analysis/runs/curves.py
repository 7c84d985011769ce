"""Compute curves over training: mean and range over seeds, and a thinned version for plots."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from analysis.runs.run import LoadedRun

Floats = NDArray[np.float64]
AXES = {"tokens": "tokens", "steps": "step", "seconds": "wall_s", "flops": "flops"}
"""Horizontal axis → metric key."""
AXIS_TITLES = {
    "tokens": "training tokens",
    "steps": "optimizer steps",
    "seconds": "training time (s)",
    "flops": "model FLOPs",
}


@dataclass(frozen=True)
class Curve:
    """Mean and range over seeds of a metric; all arrays have shape (points,)."""

    x: dict[str, Floats]
    """Axis of ``AXES`` → positions; without the axes that some run lacks."""
    mean: Floats
    low: Floats
    """Lowest seed."""
    high: Floats
    """Highest seed."""
    seeds: int

    def first_reaching(self, target: float, axis: str, sign: int = -1) -> float:
        """Return where the mean first reaches ``target`` on ``axis``, interpolated linearly; NaN if never.

        Args:
            target: value to reach.
            axis: of ``AXES``.
            sign: −1 where lower is better, 1 where higher is.
        """
        if axis not in self.x or math.isnan(target):
            return math.nan
        # The target is a mean of recorded values, the curve one of logged values: they may differ by rounding.
        reached = np.flatnonzero(sign * self.mean >= sign * target - 1e-6)
        if not len(reached):
            return math.nan
        i, x = int(reached[0]), self.x[axis]
        if i == 0 or sign * self.mean[i] <= sign * target:
            return float(x[i])
        share = (self.mean[i - 1] - target) / (self.mean[i - 1] - self.mean[i])
        return float(x[i - 1] + share * (x[i] - x[i - 1]))


def single_curve(run: LoadedRun, key: str) -> Curve | None:
    """Return the finite values of a metric of one run; None if there are none."""
    return mean_curve([run], key)


def mean_curve(runs: Sequence[LoadedRun], key: str = "val/loss") -> Curve | None:
    """Return mean and range of a metric over runs at the steps where all have a finite value; None without any."""
    series = [_finite(run, key) for run in runs]
    if not series or any(not len(steps) for steps, _ in series):
        return None
    common = series[0][0]
    for steps, _ in series[1:]:
        common = np.intersect1d(common, steps)
    if not len(common):
        return None
    values = np.stack([value[np.searchsorted(steps, common)] for steps, value in series])
    axes = {}
    for axis, metric in AXES.items():
        positions = [_at(run, metric, common) for run in runs]
        if all(p is not None and np.isfinite(p).all() for p in positions):
            axes[axis] = np.mean([p for p in positions if p is not None], axis=0)
    return Curve(axes, values.mean(0), values.min(0), values.max(0), len(runs))


def _finite(run: LoadedRun, key: str) -> tuple[Floats, Floats]:
    if key not in run.metrics:
        return np.empty(0), np.empty(0)
    keep = np.isfinite(run.metrics[key])
    return run.metrics["step"][keep], run.metrics[key][keep]


def _at(run: LoadedRun, metric: str, steps: Floats) -> Floats | None:
    if metric not in run.metrics:
        return None
    return run.metrics[metric][np.searchsorted(run.metrics["step"], steps)]


def thinned(values: Floats, points: int) -> NDArray[np.int64]:
    """Return at most ``points`` indices into a 1-D array: first, last, and the extremes of equal stretches.

    Plain striding would drop spikes, which are what a reader looks for.
    """
    n = len(values)
    if n <= points:
        return np.arange(n)
    stretches = max((points - 2) // 2, 1)
    edges = np.linspace(1, n - 1, stretches + 1).astype(int)
    kept = {0, n - 1}
    for start, end in pairwise(edges):
        if end > start:
            part = values[start:end]
            filled = np.where(np.isfinite(part), part, np.inf)
            kept.add(start + int(filled.argmin()))
            kept.add(start + int(np.where(np.isfinite(part), part, -np.inf).argmax()))
    return np.array(sorted(kept))
