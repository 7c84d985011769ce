"""Tables of a task: all metrics, pairs by validation loss, agreement, McNemar's test, and the examples that change."""

from __future__ import annotations

import math

from analysis import formatting
from analysis.comparison import statistics
from analysis.comparison.examples import ExampleResults
from analysis.comparison.sets import ComparisonSet
from analysis.runs.measure import Measure, loss_beside
from analysis.text_tables import TextTable
from harness.tasks.metrics import METRICS

MOST = 12
"""Changed examples that are listed in each direction of a pair."""
MAX_PAIRS = 45
"""Pairs in a table: those of ten optimizers."""
MAX_TEXT = 160
"""Characters of an answer."""


def all_metrics(comparison: ComparisonSet) -> TextTable:
    """Return every metric that the runs of a task recorded, mean and 95 % t-interval over seeds; empty for a loss."""
    measures = [] if comparison.measure.is_loss else _recorded(comparison)
    rows = []
    for index in comparison.ranked() if measures else ():
        arm = comparison.arms[index]
        finals = [statistics.interval(list(arm.results(measure).values())) for measure in measures]
        cells = [
            f"{measure.text(final.mean)}{f' ± {measure.gap(final.half_width, 2)}' if final.n > 1 else ''}"
            for measure, final in zip(measures, finals, strict=True)
        ]
        rows.append([arm.label, *cells])
    return TextTable(["optimizer", *(measure.shown_name for measure in measures)], rows)


def _recorded(comparison: ComparisonSet) -> list[Measure]:
    """Return the metrics of the finished runs in the order of `METRICS`, the set's own first."""
    names = {
        name for arm in comparison.arms for run in arm.finished for name in run.summary.get("metrics") or {}
    }
    others = [metric for name, metric in METRICS.items() if name in names - {comparison.measure.name}]
    return [comparison.measure, *(Measure(metric.name, metric.better, metric.unit) for metric in others)]


def losses(comparison: ComparisonSet) -> TextTable:
    """Return the difference in validation loss of each pair, its 95 % interval over seeds, and p after Holm.

    Empty where the loss itself is compared, or where no pair has two common seeds.
    """
    unit = loss_beside(comparison.measure).unit
    heads = ["optimizers", f"difference ({unit})", "95 % interval", "common seeds", "p (Holm)"]
    tests = comparison.loss_tests
    if tests is None or not (tests.n > 1).any():
        return TextTable(heads, [])
    names = [arm.label for arm in comparison.arms]
    rows = []
    for k, (i, j) in enumerate(tests.pairs[:MAX_PAIRS]):
        mean, half, p = (float(part[k]) for part in (tests.mean, tests.half_width, tests.p_holm))
        bounds = " to ".join(_signed(bound) for bound in (mean - half, mean + half))
        row = [f"{names[i]} − {names[j]}", _signed(mean), bounds, str(tests.n[k])]
        rows.append([*row, _p(p) if math.isfinite(p) else "no test"])
    return TextTable(heads, rows)


def _signed(value: float) -> str:
    return f"{value:+.4f}".replace("-", "−") if math.isfinite(value) else formatting.MISSING


def agreement(comparison: ComparisonSet) -> TextTable:
    """Return how often the seeds of each arm, and each pair of arms, predict the same, and McNemar's exact test."""
    heads = ["optimizers", "same prediction", "kappa", "right alone, by seed", "McNemar's exact p, by seed"]
    examples = comparison.examples
    if examples is None or not examples.has_correct:
        return TextTable(heads, [])
    names = [arm.label for arm in comparison.arms]
    rows = []
    for index, name in enumerate(names):
        if len(examples.answers[index]) > 1:
            rows.append([f"{name}: two seeds", *_agreement(examples, index, index), "", ""])
    for i, j in comparison.tests.pairs[:MAX_PAIRS]:
        tests = examples.mcnemar(i, j)
        alone = ", ".join(f"{test.only_first} : {test.only_second}" for test in tests)
        p = ", ".join(_p(test.p) for test in tests)
        rows.append([f"{names[i]} : {names[j]}", *_agreement(examples, i, j), alone, p])
    return TextTable(heads, rows)


def _agreement(examples: ExampleResults, i: int, j: int) -> list[str]:
    found = examples.agreement(i, j)
    share = f"{100 * found.share:.1f} %" if math.isfinite(found.share) else formatting.MISSING
    return [share, formatting.significant(found.kappa)]


def _p(value: float) -> str:
    return "< 0.0001" if value < 1e-4 else f"{value:.2g}"


def changed(comparison: ComparisonSet) -> TextTable:
    """Return the examples that all common seeds of one arm answer correctly and none of another.

    The best arm against each of the others, in both directions; an answer is that of the first common seed.
    """
    heads = ["always right", "always wrong", "row", "reference", "wrong answer", "its text"]
    examples, ranked = comparison.examples, comparison.ranked()
    if examples is None or len(ranked) < 2:
        return TextTable(heads, [])
    rows = []
    for other in ranked[1:]:
        for right, wrong in ((ranked[0], other), (other, ranked[0])):
            rows += _changed(comparison, examples, right, wrong)
    has_text = any(row[-1] for row in rows)
    return TextTable(heads if has_text else heads[:-1], [row if has_text else row[:-1] for row in rows])


def _changed(comparison: ComparisonSet, examples: ExampleResults, right: int, wrong: int) -> list[list[str]]:
    names = [comparison.arms[index].label for index in (right, wrong)]
    indices = examples.changed(right, wrong)
    if not indices:
        return []
    answers = examples.answers[wrong][examples.common_seeds(right, wrong)[0]]
    texts = answers.texts or [""] * len(examples)
    rows = [
        [
            *names,
            str(examples.rows[k]),
            _short(examples.references[k]),
            _short(answers.predictions[k] or "(none)"),
            _short(texts[k]),
        ]
        for k in indices[:MOST]
    ]
    if len(indices) > MOST:
        rows.append([*names, f"and {formatting.grouped(len(indices) - MOST)} more", "", "", ""])
    return rows


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= MAX_TEXT else f"{line[: MAX_TEXT - 1]}…"
