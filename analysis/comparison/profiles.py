"""Compare submissions over several workloads by their times to a target: performance profiles and their scores.

The ratio of a submission on a workload is its time over the best submission's; ρ(τ) is the share of workloads on
which the ratio is at most τ (Dolan & Moré, Math. Program. 91 (2002) 201-213). The score of the AlgoPerf benchmark
(Dahl et al. 2023, arXiv 2306.07179) is the mean of ρ over τ from 1 to 4. A submission that never reaches the target
has an infinite time, and one that lacks a workload counts as not having reached it. All of it depends on the other
submissions: adding one changes every score, and few workloads say little, whatever the number of seeds.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from analysis.comparison.sets import ComparisonSet

Floats = NDArray[np.float64]
MAX_RATIO = 4.0
"""Upper end of τ in AlgoPerf's score."""


@dataclass(frozen=True)
class Profiles:
    """Times and scores of submissions over workloads.

    Attributes:
        submissions: their names.
        workloads: titles of the sets.
        axis: ``steps`` or ``seconds``.
        times: to the target of each workload, shape (submissions, workloads); inf where it is not reached.
        ratios: to the best submission of each workload; inf likewise, and where nobody reached the target.
        scores: AlgoPerf's score of each submission, 0 to 1.
    """

    submissions: list[str]
    workloads: list[str]
    axis: str
    times: Floats
    ratios: Floats
    scores: Floats


def performance_ratios(times: ArrayLike) -> Floats:
    """Return time over the best time of each workload.

    Args:
        times: shape (submissions, workloads), positive; inf or NaN where the target was not reached.
    """
    known = np.where(np.isnan(np.asarray(times, float)), np.inf, np.asarray(times, float))
    best = known.min(axis=0)
    with np.errstate(invalid="ignore"):
        return np.where(np.isfinite(known), known / best, np.inf)


def profile(ratios: ArrayLike, taus: ArrayLike) -> Floats:
    """Return ρ(τ), the share of workloads with a ratio of at most τ; shape (submissions, taus)."""
    ratios, taus = np.asarray(ratios, float), np.asarray(taus, float)
    return (ratios[:, :, None] <= taus).mean(axis=1)


def scores(ratios: ArrayLike, max_ratio: float = MAX_RATIO) -> Floats:
    """Return the mean of ρ over τ from 1 to ``max_ratio``, exactly: ρ is a step function.

    A workload with ratio r adds (max_ratio − r)/(max_ratio − 1), and nothing beyond ``max_ratio``.
    """
    clipped = np.minimum(np.asarray(ratios, float), max_ratio)
    return ((max_ratio - clipped) / (max_ratio - 1)).mean(axis=1)


def compare_sets(
    sets: Sequence[ComparisonSet], axis: str = "steps", only: Collection[str] | None = None
) -> Profiles | None:
    """Take each set as a workload and each optimizer as a submission, at its best arm of a set.

    The target of a workload is `ComparisonSet.target`, the worst mean of its arms; an arm reaches it where its mean
    curve does, as in the table of the report.

    Args:
        sets: the workloads.
        axis: ``steps`` or ``seconds``.
        only: optimizers to compare; None: all.

    Returns:
        None with fewer than two sets or two optimizers.
    """
    times: dict[str, dict[int, float]] = {}
    for index, comparison in enumerate(sets):
        for arm in comparison.arms:
            if arm.curve is not None and (only is None or arm.optimizer in only):
                reached = arm.curve.first_reaching(comparison.target, axis, comparison.measure.sign)
                best = times.setdefault(arm.optimizer, {})
                best[index] = min(best.get(index, math.inf), reached if reached > 0 else math.inf)
    table = np.array([[own.get(i, math.inf) for i in range(len(sets))] for own in times.values()])
    if len(sets) < 2 or len(times) < 2 or not np.isfinite(table).any():
        return None
    ratios = performance_ratios(table)
    return Profiles(list(times), [c.title for c in sets], axis, table, ratios, scores(ratios))


def to_json(profiles: Profiles | None) -> Mapping[str, object] | None:
    """Return times, ratios and scores by submission; a target that was not reached is null."""
    if profiles is None:
        return None
    rows = zip(profiles.submissions, profiles.times, profiles.ratios, profiles.scores, strict=True)
    return {
        "axis": profiles.axis,
        "max_ratio": MAX_RATIO,
        "workloads": profiles.workloads,
        "submissions": [
            {"name": name, "times": list(times), "ratios": list(ratios), "score": float(score)}
            for name, times, ratios, score in rows
        ],
    }
