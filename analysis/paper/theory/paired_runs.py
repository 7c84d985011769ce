"""Figure 2, exact factors against Newton-Schulz: pairs of runs that differ in the orthogonalizer alone.

Both runs of a pair have the same seed, hence the same initial weights and batches, and the same options. Pairs with
different learning rates form rows of their own: five Newton-Schulz steps shorten the update, so that a difference at
equal rates may be one of step length. The intervals are t-intervals over seeds.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from analysis.comparison.statistics import Interval, interval
from analysis.paper.theory.arms import TheoryArm, setting_key
from analysis.paper.theory.run_moments import is_exact, takes_newton_schulz
from analysis.runs.measure import LOSS
from analysis.runs.run import LoadedRun

DIFFERENT = ("name", "orthogonalizer", "orthogonalizer_steps", "orthogonalizer_dtype", "lr")
"""Options in which the runs of a pair may differ; all others are equal. The rates are stated with each row."""


class RunPair(NamedTuple):
    """Two runs that differ in the orthogonalizer."""

    exact: LoadedRun
    newton_schulz: LoadedRun


class PairedRow(NamedTuple):
    """Validation losses of all pairs of one setting after one step.

    Attributes:
        arm: of the exact runs.
        exact_lr, newton_schulz_lr: peak learning rates of the matrix rule.
        step: of the evaluation.
        is_last: it is the last one.
        exact, newton_schulz: mean loss over the seeds, nats per token.
        difference: of newton_schulz - exact over the seeds.
    """

    arm: TheoryArm
    exact_lr: float
    newton_schulz_lr: float
    step: int
    is_last: bool
    exact: float
    newton_schulz: float
    difference: Interval


def pairs(runs: Sequence[LoadedRun]) -> list[RunPair]:
    """Return the pairs of finished runs with equal seeds and settings; of several equal runs the first."""
    finished = [run for run in runs if run.finished]
    exact = {
        (setting_key(run, DIFFERENT), run.seed, _lr(run)): run for run in reversed(finished) if is_exact(run)
    }
    other = {
        (setting_key(run, DIFFERENT), run.seed, _lr(run)): run
        for run in reversed(finished)
        if takes_newton_schulz(run)
    }
    return [
        RunPair(exact[key], other[other_key])
        for key in reversed(exact)
        for other_key in reversed(other)
        if key[:2] == other_key[:2]
    ]


def _lr(run: LoadedRun) -> float:
    return float(run.optimizer_config["lr"])


def paired_rows(found: Sequence[RunPair], arms: Mapping[Path, TheoryArm]) -> list[PairedRow]:
    """Return the losses of all pairs after each step in which all of them were evaluated."""
    groups: dict[tuple[TheoryArm, TheoryArm], list[RunPair]] = defaultdict(list)
    for pair in found:
        # Seeds of one setting are replicates of each other.
        groups[arms[pair.exact.folder], arms[pair.newton_schulz.folder]].append(pair)
    rows = []
    for (arm, _), group in groups.items():
        curves = [(evaluations(pair.exact), evaluations(pair.newton_schulz)) for pair in group]
        steps = sorted(set.intersection(*(set(curve) for both in curves for curve in both)))
        for step in steps:
            exact, other = (np.array([both[i][step] for both in curves]) for i in (0, 1))
            row = PairedRow(
                arm,
                _lr(group[0].exact),
                _lr(group[0].newton_schulz),
                step,
                step == steps[-1],
                float(exact.mean()),
                float(other.mean()),
                interval(other - exact),
            )
            rows.append(row)
    return rows


def evaluations(run: LoadedRun) -> dict[int, float]:
    """Return step → validation loss of the steps with an evaluation."""
    steps, losses = run.metrics.get("step"), run.metrics.get(LOSS.key)
    if steps is None or losses is None:
        return {}
    known = np.isfinite(losses)
    return {int(step): float(value) for step, value in zip(steps[known], losses[known], strict=True)}
