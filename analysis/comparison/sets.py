"""Group runs into sets that may be compared, and each set into arms (optimizers) with common seeds."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from analysis import formatting
from analysis.comparison import examples, statistics
from analysis.comparison.examples import ExampleResults
from analysis.comparison.statistics import Floats, Interval, Pairwise
from analysis.runs.curves import Curve, mean_curve
from analysis.runs.measure import Measure, loss_beside
from analysis.runs.run import LoadedRun
from harness.tasks.metrics import METRICS

if TYPE_CHECKING:
    from analysis.comparison.memorization import SetMemorization
    from analysis.runs.tuning_ledger import TunedArm


@dataclass
class Arm:
    """All runs of a set that use one optimizer with one set of options."""

    label: str
    """Optimizer name, followed by the options in which it differs from other arms of that name."""
    optimizer: str
    runs: list[LoadedRun]
    """Including failed ones, in the order of seeds."""
    final: Interval = field(default_factory=lambda: Interval(0, math.nan, math.nan, math.nan))
    """What the set is compared by, over the finished seeds."""
    curve: Curve | None = None
    """Mean of the same over training; None if no run finished."""

    @property
    def finished(self) -> list[LoadedRun]:
        """Runs that reached their last step with a finite result."""
        return [run for run in self.runs if run.finished]

    @property
    def tuning(self) -> TunedArm | None:
        """The tuning study that selected this arm's setting; None without one."""
        return next((run.tuning for run in self.runs if run.tuning is not None), None)

    def results(self, measure: Measure) -> dict[int, float]:
        """Return seed → final value of ``measure`` of the finished runs."""
        return {run.seed: run.final(measure) for run in self.finished}

    def mean(self, key: str, part: str | None = None) -> float:
        """Return the mean over finished runs of a number in their summaries; NaN if none has it."""
        values = [value for run in self.finished if math.isfinite(value := run.fact(key, part))]
        return float(np.mean(values)) if values else math.nan

    def mean_time(self, *parts: str) -> float:
        """Return seconds per step spent in ``parts``, averaged over steps and finished runs; NaN if not measured."""
        times = [[t for part in parts if math.isfinite(t := run.time(part))] for run in self.finished]
        sums = [sum(measured) for measured in times if measured]
        return float(np.mean(sums)) if sums else math.nan


@dataclass
class ComparisonSet:
    """Runs with the same data, model, budget and precision (one comparison key)."""

    key: str
    title: str
    """Short description of model, budget and data."""
    runs: list[LoadedRun]
    arms: list[Arm]
    seeds: list[int]
    """All seeds that any arm has."""
    measure: Measure
    """What the arms are compared by: the metric of the task, else the validation loss."""
    results: Floats
    """Final values of the measure, shape (arms, seeds); NaN where missing."""
    tests: Pairwise
    examples: ExampleResults | None = None
    """Per-example results of a task; None without them."""
    examples_problem: str | None = None
    """Why a task's set has none, as a clause."""
    peak_kind: str = "peak"
    """Kind of memory that optimizers are compared by: training's peak, or the whole run's where a run lacks that."""
    target: float = math.nan
    """Worst mean result among the arms that learned something; NaN without a finished arm."""
    memorization: SetMemorization | None = None
    """What `optbench memorize` found about these runs (`memorization.attach`); None where it was not run."""
    replaced: list[str] = field(default_factory=list)
    """One line for each run that is not used because another one has the same arm and seed."""

    @property
    def entropy(self) -> float:
        """Unigram entropy of the training split (nats/token); NaN where no run recorded it, and for metrics."""
        if not self.measure.is_loss:
            return math.nan
        values = [value for run in self.runs if math.isfinite(value := run.fact("unigram_entropy"))]
        return float(np.median(values)) if values else math.nan

    @property
    def loss_tests(self) -> Pairwise | None:
        """Paired t-tests of the validation loss over seeds alone, for a set that is compared by a metric; else None.

        A metric counts examples that cross a threshold; the loss often differs where it shows nothing.
        """
        if self.measure.is_loss:
            return None
        return statistics.pairwise(_final_values(self.arms, self.seeds, loss_beside(self.measure)))

    @property
    def studies(self) -> list[tuple[int, TunedArm]]:
        """Index and tuning study of each arm whose setting a study selected."""
        return [(index, arm.tuning) for index, arm in enumerate(self.arms) if arm.tuning is not None]

    def pair(self, i: int, j: int) -> int:
        """Return the index into ``tests`` of the pair of arms i and j."""
        return self.tests.pairs.index((min(i, j), max(i, j)))

    def ranked(self) -> list[int]:
        """Return the indices of the arms with finished runs, best mean first."""
        finished = [i for i, arm in enumerate(self.arms) if arm.final.n]
        return sorted(finished, key=lambda i: -self.measure.sign * self.arms[i].final.mean)


def group_into_sets(runs: Sequence[LoadedRun], order: Sequence[str] = ()) -> list[ComparisonSet]:
    """Group runs into sets by comparison key, largest set first.

    Args:
        runs: as `analysis.runs.loading.load` returns them.
        order: optimizer names in the order of their arms; other optimizers follow by name.
    """
    by_key: dict[str, list[LoadedRun]] = {}
    for run in runs:
        by_key.setdefault(run.comparison_key, []).append(run)
    sets = [_build(key, members, order) for key, members in by_key.items()]
    return sorted(sets, key=lambda s: (-len(s.runs), s.title))


def _build(key: str, runs: list[LoadedRun], order: Sequence[str]) -> ComparisonSet:
    arms, replaced = _build_arms(runs, order)
    seeds = sorted({run.seed for arm in arms for run in arm.runs})
    # Runs that did not finish have no summary: those that did know the metric of their task.
    measure = max(runs, key=lambda run: (run.finished, "metrics" in run.summary)).measure
    results = _final_values(arms, seeds, measure)
    for arm, values in zip(arms, results, strict=True):
        arm.final = statistics.interval(values)
        arm.curve = mean_curve(arm.finished, measure.key)
    by_example, problem = _examples(arms, measure)
    # Without seeds, runs are numbered in the order of their files: nothing pairs those of two arms.
    is_paired = all(run.has_seed for arm in arms for run in arm.finished)
    tests = statistics.pairwise(results) if is_paired else statistics.welch(results)
    if by_example is not None:
        tests = statistics.with_examples(tests, by_example.variance_of_pairs(tests))
    comparison = ComparisonSet(
        key=key,
        title=_title(runs),
        runs=runs,
        arms=arms,
        seeds=seeds,
        measure=measure,
        results=results,
        tests=tests,
        examples=by_example,
        examples_problem=problem,
        peak_kind=_peak_kind(arms),
        replaced=replaced,
    )
    comparison.target = _target(comparison)
    return comparison


def _final_values(arms: Sequence[Arm], seeds: list[int], measure: Measure) -> Floats:
    """Return the final values of a measure, shape (arms, seeds); NaN where a run is missing or did not finish."""
    values = np.full((len(arms), len(seeds)), np.nan)
    for row, arm in zip(values, arms, strict=True):
        for seed, value in arm.results(measure).items():
            row[seeds.index(seed)] = value
    return values


def _examples(arms: Sequence[Arm], measure: Measure) -> tuple[ExampleResults | None, str | None]:
    """Return the aligned per-example results of a task's runs, or why there are none; neither for a loss."""
    if measure.name not in METRICS:
        return None, None
    runs = [{run.seed: run for run in arm.finished} for arm in arms]
    if problem := examples.find_problem(runs, measure):
        return None, problem
    return ExampleResults(runs, measure, _class_names(run for arm in arms for run in arm.finished)), None


def _class_names(runs: Iterable[LoadedRun]) -> list[str] | None:
    """Return the classes in order as a run records them; None where none does."""
    for run in runs:
        task = run.config.get("task")
        for labels in (run.summary.get("labels"), task.get("labels") if isinstance(task, dict) else None):
            if isinstance(labels, list):
                return [str(label) for label in labels]
    return None


def _peak_kind(arms: Sequence[Arm]) -> str:
    """Return the kind of peak that all finished runs have: one definition for all arms."""
    finished = [run for arm in arms for run in arm.finished]
    has_training = all(math.isfinite(run.fact("memory_bytes", "training_peak")) for run in finished)
    return "training_peak" if finished and has_training else "peak"


def _target(comparison: ComparisonSet) -> float:
    """Return the worst mean of the arms; of those below the unigram entropy where there are some."""
    means = [arm.final.mean for arm in comparison.arms if arm.final.n]
    learned = [mean for mean in means if mean < comparison.entropy] or means
    return min(learned, key=lambda mean: comparison.measure.sign * mean, default=math.nan)


def _build_arms(runs: list[LoadedRun], order: Sequence[str]) -> tuple[list[Arm], list[str]]:
    members: dict[tuple[str, str], list[LoadedRun]] = {}
    for run in runs:
        settings = json.dumps(run.optimizer_config, sort_keys=True, default=str)
        members.setdefault((run.optimizer, settings), []).append(run)
    labels = _labels({key: group[0] for key, group in members.items()})
    arms: list[Arm] = []
    replaced: list[str] = []
    for key, group in members.items():
        by_seed: dict[int, LoadedRun] = {}
        # Sorted so that a finished run replaces one that is not.
        for run in sorted(group, key=_completeness):
            if (other := by_seed.get(run.seed)) is not None:
                same = "has the same optimizer and seed" if run.has_seed else "is the same run"
                replaced.append(f"{other.where} is not used: {run.where} {same}")
            by_seed[run.seed] = run
        arms.append(Arm(labels[key], key[0], [by_seed[seed] for seed in sorted(by_seed)]))
    place = {name: index for index, name in enumerate(order)}
    arms.sort(key=lambda arm: (place.get(arm.optimizer, len(place)), arm.label))
    return arms, replaced


def _completeness(run: LoadedRun) -> tuple[bool, bool, int, str]:
    return (
        run.finished,
        run.summary != {},
        len(run.metrics.get("step", ())) if run.is_external else 0,
        run.where,
    )


def _labels(first: Mapping[tuple[str, str], LoadedRun]) -> dict[tuple[str, str], str]:
    """Label each arm by its optimizer, and by the options in which arms of one optimizer differ."""
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


def _title(runs: list[LoadedRun]) -> str:
    """Return e.g. ``llama_tiny (1.31 M parameters) · 200 steps, 410 k tokens · kjv · fp32`` from the fullest record."""
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


def unequal_budgets(comparison: ComparisonSet) -> list[str]:
    """Return one phrase per quantity in which the arms' budgets differ; empty if they are equal.

    Steps must agree exactly, tokens within a seed to 0.1 % (a skipped step counts no tokens).
    """
    finished = [run for arm in comparison.arms for run in arm.finished]
    differences = []
    for key, noun in (("steps", "steps done"), ("steps_planned", "steps planned")):
        values = sorted({run.fact(key) for run in finished if math.isfinite(run.fact(key))})
        if len(values) > 1:
            differences.append(
                f"{noun} range from {formatting.grouped(values[0])} to {formatting.grouped(values[-1])}"
            )
    # Without common seeds all runs are compared with one another.
    groups: dict[str, list[LoadedRun]] = {"": finished}
    if comparison.tests.paired:
        groups = {f" of seed {s}": [run for run in finished if run.seed == s] for s in comparison.seeds}
    for whose, runs in groups.items():
        tokens = [value for run in runs if math.isfinite(value := run.fact("tokens"))]
        if tokens and max(tokens) > 1.001 * min(tokens):
            differences.append(
                f"tokens{whose} range from {formatting.count(min(tokens))} to {formatting.count(max(tokens))}"
            )
    return differences


def unstated_workload(comparison: ComparisonSet) -> str:
    """Return what external logs do not state of their workload, as a clause; empty if nothing is lacking."""
    lacking = {run.unstated for run in comparison.runs if run.unstated}
    return f"the logs do not state their {max(lacking, key=len)}" if lacking else ""


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested mappings as one mapping with dotted keys."""
    leaves: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            leaves.update(flatten(value, f"{prefix}{key}."))
        else:
            leaves[f"{prefix}{key}"] = value
    return leaves
