"""Classes and numbers of examples: which labels there are, in which order, and which of the two a label is."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from harness.config.schema import TaskConfig
from harness.data.rows import Value
from harness.errors import InputError
from harness.tasks.example_rows import RawExamples
from harness.tasks.templates import text_of

FEWEST_TO_DOUBT = 20
"""Different labels from which they are taken for no classes, if they are as many as half of the rows."""

Labels = NDArray[np.int64] | NDArray[np.float64]


def encode_labels(
    task: TaskConfig, training: RawExamples, validation: RawExamples
) -> tuple[tuple[str, ...] | None, Labels, Labels]:
    """Return the classes in order, and the labels of both splits.

    Returns:
        classes: None if labels are numbers. Then labels are float64, else int64 indices of the classes, (examples,).

    Raises:
        InputError: a number that is none; a class that only one split or only ``task.labels`` has; fewer than two
            classes; so many different labels that they are no classes.
    """
    if _is_number(task, training.labels):
        return None, _numbers(task, training), _numbers(task, validation)
    names = [class_name(value) for value in training.labels]
    counts = Counter(names)
    if task.labels is not None:
        classes = tuple(task.labels)
    else:
        # F1 is that of the second class: a data set says which one that is, and sorted names may turn them around.
        declared = [class_name(name) for name in training.classes]
        classes = tuple(name for name in declared if counts[name]) or _sorted(counts)
    _check_classes(task, classes, counts, training)
    index = {name: number for number, name in enumerate(classes)}
    train = np.array([index[name] for name in names], dtype=np.int64)
    held_out = np.zeros(len(validation.labels), dtype=np.int64)
    for number, (value, place) in enumerate(zip(validation.labels, validation.places)):
        name = class_name(value)
        if name not in index:
            reason = f"is {name!r} in {place}, a class that no training row has"
            raise InputError("task.label", task.label, reason, allowed=", ".join(classes))
        held_out[number] = index[name]
    return classes, train, held_out


def class_name(value: Value) -> str:
    """Return the name of a class: text without white space around it; 1.0 is "1", True is "true"."""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return text_of(value).strip()


def _is_number(task: TaskConfig, labels: Sequence[Value]) -> bool:
    if task.target != "auto" or task.labels is not None:
        return task.target == "number"
    numbers = [_number(value) for value in labels]
    return None not in numbers and any(number is not None and number % 1 for number in numbers)


def _number(value: Value) -> float | None:
    """Return a finite number, or None for a value that is none. True is no number, and neither is "1_000"."""
    if isinstance(value, bool) or value is None or (isinstance(value, str) and "_" in value):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _numbers(task: TaskConfig, raw: RawExamples) -> NDArray[np.float64]:
    numbers = np.zeros(len(raw.labels), dtype=np.float64)
    for index, (value, place) in enumerate(zip(raw.labels, raw.places)):
        number = _number(value)
        if number is None:
            reason = f"is {text_of(value)[:60]!r} in {place}, not a finite number"
            raise InputError("task.label", task.label, reason, fix="task.target=class, if labels are classes")
        numbers[index] = number
    return numbers


def _sorted(names: Counter[str]) -> tuple[str, ...]:
    if all(name.removeprefix("-").isdecimal() for name in names):
        return tuple(sorted(names, key=int))
    return tuple(sorted(names))


def _check_classes(task: TaskConfig, classes: Sequence[str], counts: Counter[str], raw: RawExamples) -> None:
    if task.labels is not None:
        for value, place in zip(raw.labels, raw.places):
            if class_name(value) not in classes:
                reason = f"is {class_name(value)[:60]!r} in {place}, which task.labels does not hold"
                raise InputError("task.label", task.label, reason, allowed=", ".join(classes))
        for name in classes:
            if not counts[name]:
                reason = f"is a class that no training row has in the column {task.label}"
                raise InputError("task.labels", name, reason, allowed=sorted(counts))
    if len(counts) < 2:
        only = next(iter(counts))
        reason = f"is {only!r} in all {len(raw.labels):,} training rows: there is nothing to learn"
        raise InputError("task.label", task.label, reason, allowed="a column with at least two classes")
    if len(counts) > FEWEST_TO_DOUBT and 2 * len(counts) > len(raw.labels) and task.target == "auto":
        reason = f"has {len(counts):,} different values in {len(raw.labels):,} rows, which are no classes"
        raise InputError(
            "task.label",
            task.label,
            reason,
            allowed="a column of classes or numbers",
            fix="task.target=number if they are numbers, task.target=class if they are classes",
        )
