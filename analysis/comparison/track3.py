"""The rule of modded-nanogpt's track 3 for "reaches a validation loss of 3.28", as a named test.

The rule, as its submissions cite it: (3.28 − mean loss)·√n ≥ 0.004 over n runs at one common step. It is a one-sided
z-test that takes the standard deviation of a run as known, σ = 0.0013: z = (3.28 − mean)·√n/σ, and 0.004 is z = 3.08,
p = 0.001. Source: github.com/KellerJordan/modded-nanogpt, records/track_3_optimization, e.g. the README of
results/20260506_trustlight, which gives z and p for a mean.

The rule takes the step as fixed beforehand. The first of many steps that passes is chosen by the same losses; since the
loss falls with the step, this costs little, but no p-value here accounts for it. Nor does it compare two submissions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from analysis.comparison.sets import Arm

TARGET = 3.28
"""Nats/token."""
SIGMA = 0.0013
"""Standard deviation of the final loss over seeds that the rule takes as known, nats/token."""
MARGIN = 0.004
"""Least (target − mean)·√n that passes, nats/token."""


@dataclass(frozen=True)
class RuleResult:
    """Outcome of the rule for one sample of losses, and of the t-test that estimates the deviation instead."""

    n: int
    """Runs with a finite loss, of which the figures are."""
    diverged: int
    """Runs without one: with any of them the rule is not passed."""
    mean: float
    margin: float
    """(target − mean)·√n."""
    z: float
    p: float
    """One-sided, with the rule's σ."""
    passed: bool
    p_t: float
    """One-sided p of the t-test with the sample's own deviation; NaN for n < 2 or equal losses."""


def rule(
    losses: ArrayLike,
    target: float = TARGET,
    sigma: float = SIGMA,
    margin: float = MARGIN,
    *,
    diverged: int = 0,
) -> RuleResult:
    """Apply the rule to the losses of runs at one step.

    Args:
        losses: 1-D, nats/token, finite.
        target: to be reached.
        sigma: standard deviation of a run that is taken as known.
        margin: least (target − mean)·√n that passes.
        diverged: runs of the same sample without a finite loss at this step.
    """
    values = np.asarray(losses, float)
    n = len(values)
    mean = float(values.mean()) if n else math.nan
    scaled = (target - mean) * math.sqrt(n)
    z = scaled / sigma
    varies = n > 1 and float(np.ptp(values)) > 0
    p_t = _p_value(values, target) if varies else math.nan
    # Losses have five digits: a margin of 0.004 less rounding passes.
    passed = not diverged and scaled >= margin - 1e-12
    return RuleResult(n, diverged, mean, scaled, z, float(stats.norm.sf(z)), passed, p_t)


def _p_value(values: NDArray[np.float64], target: float) -> float:
    _, p = stats.ttest_1samp(values, target, alternative="less")
    return float(np.asarray(p))


def first_passing_step(curves: Sequence[tuple[ArrayLike, ArrayLike]], target: float = TARGET) -> float:
    """Return the first step at which all runs have a finite loss and their mean passes the rule; NaN if none does.

    Args:
        curves: steps and losses of each run.
        target: nats/token.
    """
    series = [(np.asarray(steps, float), np.asarray(losses, float)) for steps, losses in curves]
    series = [(steps[np.isfinite(losses)], losses[np.isfinite(losses)]) for steps, losses in series]
    if not series:
        return math.nan
    common = reduce(np.intersect1d, [steps for steps, _ in series])
    for step in common:
        if rule([losses[np.searchsorted(steps, step)] for steps, losses in series], target).passed:
            return float(step)
    return math.nan


def judge_arm(arm: Arm) -> dict[str, float | int | bool | str]:
    """Return the rule's outcome at the last step of an arm, and the first step that passes, for the JSON document.

    A run that diverged has no loss at the last step, so that the arm does not pass there, whatever the others' mean is.
    """
    diverged = [run for run in arm.runs if run.state == "diverged"]
    result = rule([run.final_loss for run in arm.finished], diverged=len(diverged))
    curves = [(run.metrics["step"], run.metrics["val/loss"]) for run in (*arm.finished, *diverged)]
    return {"arm": arm.label, **vars(result), "first_passing_step": first_passing_step(curves)}
