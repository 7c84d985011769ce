"""A tuning study in words: what each optimizer was given and what it chose, and every trial."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from analysis import formatting
from analysis.compare.comparison import ComparisonSet
from analysis.report.details import Grid
from analysis.runs.tuning_ledger import Trial, Tuned
from harness.visible import markdown_row

ORDER = ("finished", "diverged", "failed", "interrupted", "running", "pending")


def of_set(chosen: ComparisonSet) -> list[tuple[int, Tuned]]:
    """Arms of a set that a study chose: index of the arm, and what it was given."""
    found = ((index, arm.tuning) for index, arm in enumerate(chosen.arms))
    return [(index, tuning) for index, tuning in found if tuning is not None]


def overview(arms: Sequence[Tuned]) -> Grid:
    """A row per optimizer."""
    head = [
        "optimizer",
        "trials",
        "outcome",
        "training time",
        "best setting",
        "val loss there (one seed)",
        "on an edge",
    ]
    rows = []
    for arm in arms:
        chosen = arm.chosen
        counts = [f"{arm.counts[state]} {state}" for state in ORDER if arm.counts[state]]
        rows.append(
            [
                arm.label,
                str(len(arm.spent)),
                ", ".join(counts),
                formatting.seconds(arm.seconds) if arm.seconds else formatting.MISSING,
                setting(chosen.values) if chosen else "none",
                formatting.loss(chosen.loss) if chosen else formatting.MISSING,
                ", ".join(f"{key} {side}" for key, side in arm.edges.items())
                or ("no" if chosen else formatting.MISSING),
            ]
        )
    return head, rows


def listing(arms: Sequence[Tuned]) -> Grid:
    """A row per trial."""
    head = ["optimizer", "trial", "setting", "state", "val loss", "training time", ""]
    return head, [_row(arm, trial) for arm in arms for trial in arm.trials]


def _row(arm: Tuned, trial: Trial) -> list[str]:
    marks = ["best"] if trial.number == arm.best else []
    marks += ["added by the extension"] if trial.added else []
    marks += [trial.reason] if trial.reason else []
    seconds = formatting.seconds(trial.seconds) if math.isfinite(trial.seconds) else formatting.MISSING
    own = [arm.label, str(trial.number), setting(trial.values), trial.state]
    return [*own, formatting.loss(trial.loss), seconds, "; ".join(marks)]


def setting(values: Mapping[str, float | str]) -> str:
    """``lr=0.004 rank=32``."""
    shown = {key: f"{value:g}" if isinstance(value, float) else str(value) for key, value in values.items()}
    return " ".join(f"{key}={value}" for key, value in shown.items())


def markdown(arms: Sequence[Tuned]) -> str:
    """Both tables for a file."""
    parts = ["# Tuning", ""]
    for head, rows in (overview(arms), listing(arms)):
        lines = [head, ["---"] * len(head), *rows]
        parts += map(markdown_row, lines)
        parts.append("")
    return "\n".join(parts)
