"""Runs sorted into sets that may be compared, and each set into arms (optimizers) with paired seeds."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from analysis import formatting
from analysis.compare import statistics
from analysis.compare.statistics import Floats, Interval, Pairwise
from analysis.runs.curves import Curve, mean_curve
from analysis.runs.run import Run

if TYPE_CHECKING:
    from analysis.runs.tuning_ledger import Tuned


@dataclass
class Arm:
    """One optimizer with one set of options: all its runs in a set."""

    label: str
    """Optimizer name, with the options that tell it from other arms of the same name."""
    optimizer: str
    runs: list[Run]
    """All of them, failures too, in the order of seeds."""
    final: Interval = field(default_factory=lambda: Interval(0, math.nan, math.nan, math.nan))
    """Final validation loss over the seeds that finished."""
    curve: Curve | None = None
    """Mean validation loss over training; None if no run finished."""

    @property
    def finished(self) -> list[Run]:
        """Runs that reached the end with a finite loss."""
        return [run for run in self.runs if run.finished]

    @property
    def tuning(self) -> Tuned | None:
        """The study that chose this arm's setting."""
        return next((run.tuning for run in self.runs if run.tuning is not None), None)

    def losses(self) -> dict[int, float]:
        """Seed → final validation loss of the runs that finished."""
        return {run.seed: run.final_loss for run in self.finished}

    def mean(self, key: str, part: str | None = None) -> float:
        """Mean over the finished runs of a number of their summaries; NaN if none has it."""
        values = [value for run in self.finished if math.isfinite(value := run.fact(key, part))]
        return float(np.mean(values)) if values else math.nan

    def mean_time(self, *parts: str) -> float:
        """Seconds per step spent in ``parts``, mean over steps and finished runs; NaN if unmeasured."""
        sums = [
            sum(times) for run in self.finished if (times := measured([run.time(part) for part in parts]))
        ]
        return float(np.mean(sums)) if sums else math.nan


def measured(values: Sequence[float]) -> list[float]:
    """The values that are finite."""
    return [value for value in values if math.isfinite(value)]


@dataclass
class ComparisonSet:
    """Runs with equal data, model, budget and precision (one comparison key)."""

    key: str
    title: str
    """Model, budget and data in a few words."""
    runs: list[Run]
    arms: list[Arm]
    seeds: list[int]
    """All seeds that any arm has."""
    losses: Floats
    """(arms, seeds) final validation losses, NaN where missing."""
    tests: Pairwise
    target: float = math.nan
    """Mean final loss of the arm that ends highest, of those below the unigram entropy; NaN without one."""
    set_aside: list[str] = field(default_factory=list)
    """Runs that are not used because another one has the same arm and seed, one line each."""

    @property
    def entropy(self) -> float:
        """Unigram entropy of the training split (nats/token); NaN where no run recorded it."""
        values = [value for run in self.runs if math.isfinite(value := run.fact("unigram_entropy"))]
        return float(np.median(values)) if values else math.nan

    def pair(self, i: int, j: int) -> int:
        """Index into ``tests`` of the pair of arms i and j."""
        return self.tests.pairs.index((min(i, j), max(i, j)))

    def ranked(self) -> list[int]:
        """Indices of the arms that finished, lowest mean final loss first."""
        have = [i for i, arm in enumerate(self.arms) if arm.final.n]
        return sorted(have, key=lambda i: self.arms[i].final.mean)


def compare(runs: Sequence[Run], order: Sequence[str] = ()) -> list[ComparisonSet]:
    """Sort runs into sets by comparison key, largest set first.

    Args:
        runs: of `runs.load`.
        order: optimizer names in the order in which their arms are to stand; others follow by name.
    """
    by_key: dict[str, list[Run]] = {}
    for run in runs:
        by_key.setdefault(run.comparison_key, []).append(run)
    sets = [_build(key, members, order) for key, members in by_key.items()]
    return sorted(sets, key=lambda s: (-len(s.runs), s.title))


def _build(key: str, runs: list[Run], order: Sequence[str]) -> ComparisonSet:
    arms, set_aside = _arms(runs, order)
    seeds = sorted({run.seed for arm in arms for run in arm.runs})
    losses = np.full((len(arms), len(seeds)), np.nan)
    for i, arm in enumerate(arms):
        for seed, value in arm.losses().items():
            losses[i, seeds.index(seed)] = value
        arm.final = statistics.interval(losses[i])
        arm.curve = mean_curve(arm.finished)
    chosen = ComparisonSet(
        key=key,
        title=_title(runs),
        runs=runs,
        arms=arms,
        seeds=seeds,
        losses=losses,
        tests=statistics.pairwise(losses),
        set_aside=set_aside,
    )
    chosen.target = _target(chosen)
    return chosen


def _target(chosen: ComparisonSet) -> float:
    """The highest mean final loss of the arms that learned something (of all arms if none did)."""
    means = [arm.final.mean for arm in chosen.arms if arm.final.n]
    return max([mean for mean in means if mean < chosen.entropy] or means, default=math.nan)


def _arms(runs: list[Run], order: Sequence[str]) -> tuple[list[Arm], list[str]]:
    members: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        settings = json.dumps(run.optimizer_config, sort_keys=True, default=str)
        members.setdefault((run.optimizer, settings), []).append(run)
    labels = _labels({key: group[0] for key, group in members.items()})
    arms: list[Arm] = []
    set_aside: list[str] = []
    for key, group in members.items():
        chosen: dict[int, Run] = {}
        for run in sorted(group, key=lambda r: (r.finished, r.summary != {}, r.where)):
            if (other := chosen.get(run.seed)) is not None:
                set_aside.append(f"{other.where} is not used: {run.where} has the same optimizer and seed")
            chosen[run.seed] = run
        arms.append(Arm(labels[key], key[0], [chosen[seed] for seed in sorted(chosen)]))
    place = {name: index for index, name in enumerate(order)}
    arms.sort(key=lambda arm: (place.get(arm.optimizer, len(place)), arm.label))
    return arms, set_aside


def _labels(first: Mapping[tuple[str, str], Run]) -> dict[tuple[str, str], str]:
    """Names of arms: the optimizer's, and where several arms share it the options in which they differ."""
    labels = {}
    for key, run in first.items():
        rivals = [other.optimizer_config for k, other in first.items() if k[0] == key[0]]
        varied = sorted(
            option
            for option in {name for config in rivals for name in config}
            if len({json.dumps(config.get(option), default=str) for config in rivals}) > 1
        )
        own = run.optimizer_config
        detail = ", ".join(f"{name}={own[name]}" for name in varied if name in own)
        labels[key] = f"{key[0]} ({detail})" if detail else key[0]
    return labels


def _title(runs: list[Run]) -> str:
    """``llama_tiny (1.31 M parameters) · 200 steps, 410 k tokens · kjv · fp32``, of what is recorded."""
    run = max(runs, key=lambda r: (r.finished, len(r.summary)))
    model, data = (run.config.get(part) for part in ("model", "data"))
    parts = []
    name = str(model.get("name") or "") if isinstance(model, Mapping) else ""
    parameters = run.fact("parameters")
    if name or math.isfinite(parameters):
        size = f" ({formatting.count(parameters)} parameters)" if math.isfinite(parameters) else ""
        parts.append(f"{name or 'model'}{size}")
    steps, tokens = run.fact("steps_planned"), run.fact("tokens")
    steps = steps if math.isfinite(steps) else run.steps
    if math.isfinite(steps):
        budget = f"{formatting.grouped(steps)} steps"
        parts.append(
            f"{budget}, {formatting.count(tokens)} tokens"
            if run.finished and math.isfinite(tokens)
            else budget
        )
    if isinstance(data, Mapping) and data.get("name"):
        parts.append(str(data["name"]))
    precision = run.text("precision") or run.config.get("precision")
    if precision:
        parts.append(str(precision))
    return " · ".join(parts) or run.where


def unequal_budgets(chosen: ComparisonSet) -> list[str]:
    """Why the arms' budgets are not equal, one phrase per quantity; empty if they are.

    Steps must agree exactly, tokens within a seed to 0.1 % (a masked step carries none).
    """
    finished = [run for arm in chosen.arms for run in arm.finished]
    found = []
    for key, word in (("steps", "steps done"), ("steps_planned", "steps planned")):
        values = sorted({run.fact(key) for run in finished if math.isfinite(run.fact(key))})
        if len(values) > 1:
            found.append(
                f"{word} range from {formatting.grouped(values[0])} to {formatting.grouped(values[-1])}"
            )
    for seed in chosen.seeds:
        tokens = [
            value for run in finished if run.seed == seed and math.isfinite(value := run.fact("tokens"))
        ]
        if tokens and max(tokens) > 1.001 * min(tokens):
            found.append(
                f"tokens of seed {seed} range from {formatting.count(min(tokens))} to {formatting.count(max(tokens))}"
            )
    return found


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as dotted keys."""
    leaves: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            leaves.update(flat(value, f"{prefix}{key}."))
        else:
            leaves[f"{prefix}{key}"] = value
    return leaves
