"""Metrics of tasks by GLUE's convention, computed by scikit-learn and scipy.

Values are fractions or coefficients (GLUE's board multiplies them by 100). Sources: Wang et al., "GLUE" (2018), §3
for which task has which metric; Matthews (1975) for the correlation of two classes.

Importing this module imports neither torch nor the libraries: configurations are checked before anything is loaded.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from harness.errors import InputError

Better = Literal["higher", "lower"]
TargetKind = Literal["class", "number", "text"]


@dataclass(frozen=True)
class TaskMetric:
    """One metric: its direction, unit, and the kind of answers that it compares."""

    name: str
    better: Better
    unit: str
    """``fraction`` of the examples, or empty for a coefficient."""
    kind: TargetKind
    meaning: str

    @property
    def is_mean(self) -> bool:
        """True if the metric is the share of correct examples, so that each example has a value of its own."""
        return self.unit == "fraction"


METRICS: dict[str, TaskMetric] = {
    metric.name: metric
    for metric in (
        TaskMetric("accuracy", "higher", "fraction", "class", "share of the examples with the right class"),
        TaskMetric(
            "f1",
            "higher",
            "",
            "class",
            "F1 of the second of two classes; the mean over classes (macro) where there are more; 0 where the class "
            "is never predicted",
        ),
        TaskMetric(
            "matthews",
            "higher",
            "",
            "class",
            "Matthews correlation; 0 where one class is predicted throughout",
        ),
        TaskMetric(
            "pearson",
            "higher",
            "",
            "number",
            "Pearson correlation; 0 where one number is predicted throughout",
        ),
        TaskMetric(
            "spearman",
            "higher",
            "",
            "number",
            "Spearman rank correlation; 0 where one number is predicted throughout",
        ),
        TaskMetric(
            "exact_match",
            "higher",
            "fraction",
            "text",
            "share of the examples with the reference's very answer",
        ),
    )
}


def target_kind(task: str, labels: Sequence[str] | None) -> TargetKind | None:
    """Return what a task's references are; None for a task without references (``pretrain``).

    Args:
        task: name of the task.
        labels: its classes; None for regression.
    """
    if task == "classify":
        return "number" if labels is None else "class"
    return "text" if task == "answer" else None


def default_metric(task: str, labels: Sequence[str] | None) -> str | None:
    """Return the metric of a task whose configuration names none; None for ``pretrain``, which has its loss."""
    kind = target_kind(task, labels)
    return None if kind is None else {"class": "accuracy", "number": "pearson", "text": "exact_match"}[kind]


def score(
    name: str,
    references: Sequence[str],
    predictions: Sequence[str | None],
    labels: Sequence[str] | None = None,
) -> float:
    """Return the value of a metric.

    A metric that a constant prediction leaves undefined is 0, as scikit-learn has it for Matthews and F1: a constant
    tells no examples apart. `constant_prediction` says so.

    Args:
        name: key of `METRICS`.
        references: one per example: a class, a number as text, or an answer.
        predictions: likewise; None is an answer that could not be extracted, which is wrong.
        labels: classes in order (F1 is that of the second of two); None for numbers and texts.

    Returns:
        The value; NaN if a predicted number is not finite, as after a divergence.

    Raises:
        ValueError: no examples, different lengths, or references that are all equal under a correlation.
    """
    if not references or len(references) != len(predictions):
        raise ValueError(f"{len(references)} references and {len(predictions)} predictions")
    kind = METRICS[name].kind
    if kind == "number":
        return _correlation(name, references, predictions)
    if kind == "class":
        return _classes(name, references, [str(p) for p in predictions], labels)
    return sum(r == p for r, p in zip(references, predictions, strict=True)) / len(references)


def _correlation(name: str, references: Sequence[str], predictions: Sequence[str | None]) -> float:
    from scipy import stats

    truth = [float(value) for value in references]
    values = [math.nan if value is None else float(value) for value in predictions]
    if len(set(truth)) < 2:
        raise ValueError(f"{name} is undefined: all references are {references[0]}")
    if not all(map(math.isfinite, values)):
        return math.nan
    if len(set(values)) < 2:
        return 0.0
    compute = stats.pearsonr if name == "pearson" else stats.spearmanr
    value = float(compute(truth, values)[0])  # pyright: ignore[reportArgumentType] - a pair of floats
    return value if math.isfinite(value) else 0.0  # predictions that differ by less than their own rounding


def _classes(
    name: str, references: Sequence[str], predictions: Sequence[str], labels: Sequence[str] | None
) -> float:
    from sklearn import metrics

    if name == "accuracy":
        return float(metrics.accuracy_score(references, predictions))
    if name == "matthews":
        return float(metrics.matthews_corrcoef(references, predictions))
    classes = sorted({*references, *predictions}) if labels is None else list(labels)
    absent: Any = 0  # the stubs of scikit-learn take text alone
    if len(classes) == 2:
        positive = [[word == classes[1] for word in words] for words in (references, predictions)]
        return float(metrics.f1_score(*positive, zero_division=absent))
    return float(metrics.f1_score(references, predictions, average="macro", zero_division=absent))


def constant_prediction(name: str, predictions: Sequence[str | None]) -> str | None:
    """Return a warning if all predictions are one class or number; None otherwise, and for texts."""
    kind = METRICS[name].kind
    if kind == "text" or len(set(predictions)) > 1:
        return None
    meaning = (
        f"{name} is undefined and counted as 0"
        if kind == "number" or name != "accuracy"
        else (f"{name} is that class' share")
    )
    noun = "class" if kind == "class" else "number"
    return f"one {noun}, {predictions[0]}, is predicted for all {len(predictions):,} examples: {meaning}"


def check_defined(
    task: str, name: str, references: Sequence[str], labels: Sequence[str] | None = None
) -> None:
    """Refuse a metric that the validation examples leave undefined, before training.

    Args:
        task: name of the task.
        name: its metric.
        references: of all validation examples.
        labels: classes in order; None for numbers and texts.

    Raises:
        InputError: unknown metric, one for other answers than the task's, no examples, or fewer than two different
            references under a metric of classes or numbers.
    """
    if name not in METRICS:
        raise InputError("task.metric", name, "is unknown", allowed=METRICS)
    kind = target_kind(task, labels)
    fitting = [metric.name for metric in METRICS.values() if metric.kind == kind]
    if name not in fitting:
        nouns = {"class": "classes", "number": "numbers", "text": "answers", None: "text without references"}
        reason = f"is a metric of {nouns[METRICS[name].kind]}, and task={task} predicts {nouns[kind]}"
        raise InputError("task.metric", name, reason, allowed=fitting)
    if not references:
        raise InputError("task.metric", name, "is undefined: there are no validation examples", fix=_MORE)
    distinct = set(references) if kind != "number" else {float(value) for value in references}
    if kind != "text" and len(distinct) < 2:
        noun = "class" if kind == "class" else "number"
        reason = f"is undefined: all {len(references):,} validation examples have the {noun} {references[0]}"
        raise InputError("task.metric", name, reason, fix=_MORE)
    if kind == "number" and len(references) < 3:
        reason = f"is ±1 or undefined for any predictions of {len(references)} validation examples"
        raise InputError("task.metric", name, reason, fix=_MORE)


_MORE = "data.validation_files=[…], with examples of each class"
