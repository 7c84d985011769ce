"""One warning, and the words in which warnings name arms and runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from analysis import formatting
from analysis.compare.comparison import Arm, ComparisonSet
from analysis.runs.run import Run


@dataclass(frozen=True)
class Caution:
    """One warning. ``grave``: it touches the verdict (red in the report); else it is a note on the record."""

    code: str
    message: str
    grave: bool = True


def arms_of(chosen: ComparisonSet, test: Callable[[Run], bool]) -> list[tuple[Arm, list[Run]]]:
    """The arms that have such runs, each with those runs."""
    picked = [(arm, [run for run in arm.runs if test(run)]) for arm in chosen.arms]
    return [(arm, runs) for arm, runs in picked if runs]


def named(chosen: ComparisonSet, test: Callable[[Run], bool]) -> str:
    """``adamw (seed 0) and sumo (all 3 runs)``: such runs in words; empty if there are none."""
    return formatting.listing([_where(arm, runs) for arm, runs in arms_of(chosen, test)])


def _where(arm: Arm, runs: list[Run]) -> str:
    if len(runs) == len(arm.runs) and len(runs) > 4:
        return f"{arm.label} (all {len(runs)} runs)"
    seeds = formatting.listing([str(run.seed) for run in runs])
    return f"{arm.label} (seed{'s' if len(runs) > 1 else ''} {seeds})"


def arm_labels(chosen: ComparisonSet, test: Callable[[Run], bool]) -> list[str]:
    """Labels of the arms that have such runs."""
    return [arm.label for arm, _ in arms_of(chosen, test)]
