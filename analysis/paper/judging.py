"""What a cell's values say about the published one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from analysis.paper.numbers import Grade, Printed

_ORDER: tuple[Grade, ...] = ("agrees", "close", "differs")


class Value(NamedTuple):
    """A value of ours, and why it may differ.

    Attributes:
        number: predicted or measured.
        excuse: the known reason, if there is one for this very number; None: none.
    """

    number: float
    excuse: str | None


def judge(published: Printed, values: Sequence[Value], tolerance: float) -> tuple[str, list[str]]:
    """Status of a cell by its worst value, and the reasons of the values that differ.

    Args:
        published: as printed.
        values: those that there are.
        tolerance: relative.

    Returns:
        ``not_run`` without values. ``differs_known`` only if every value that differs has its excuse.
    """
    if not values:
        return "not_run", []
    grades = [published.grade(value.number, tolerance) for value in values]
    differing = [value for value, grade in zip(values, grades, strict=True) if grade == "differs"]
    reasons = [value.excuse for value in differing if value.excuse is not None]
    if differing and len(reasons) == len(differing):
        return "differs_known", reasons
    return max(grades, key=_ORDER.index), reasons
