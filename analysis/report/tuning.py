"""What a report shows of a tuning study: its results, its trials, and loss over learning rate."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import plotly.graph_objects as go

from analysis import formatting
from analysis.comparison.sets import ComparisonSet
from analysis.pages.figures import Plot, figure, line
from analysis.report import plots
from analysis.runs.measure import loss_beside
from analysis.runs.tuning_ledger import SPENT, Trial, TunedArm
from analysis.text_tables import TextTable, markdown_lines

SPAN = 1.5
"""Nats above the lowest loss from which trials are drawn at the upper edge, so that the others stay apart."""
ORDER = ("finished", "diverged", "failed", "interrupted", "running", "pending")


def overview(arms: Sequence[TunedArm]) -> TextTable:
    """Return budget and best setting of each optimizer, one row per optimizer."""
    scored = _any_scored(arms)
    head = [
        "optimizer",
        "trials",
        "outcome",
        "training time",
        "best setting",
        "val loss there (one seed)" if not scored else "val loss, metric there (one seed)",
        "on an edge",
    ]
    rows = []
    for arm in arms:
        best = arm.best_trial
        counts = [f"{arm.counts[state]} {state}" for state in ORDER if arm.counts[state]]
        rows.append(
            [
                arm.label,
                str(len(arm.spent)),
                ", ".join(counts),
                formatting.seconds(arm.seconds) if arm.seconds else formatting.MISSING,
                setting(best.values) if best else "none",
                _result(best) if best else formatting.MISSING,
                ", ".join(f"{key} {side}" for key, side in arm.edges.items())
                or ("no" if best else formatting.MISSING),
            ]
        )
    return TextTable(head, rows)


def trial_table(arms: Sequence[TunedArm]) -> TextTable:
    """Return all trials, one row per trial."""
    result = "val loss, metric" if _any_scored(arms) else "val loss"
    head = ["optimizer", "trial", "setting", "state", result, "training time", ""]
    return TextTable(head, [_row(arm, trial) for arm in arms for trial in arm.trials])


def _any_scored(arms: Sequence[TunedArm]) -> bool:
    return any(trial.score is not None for arm in arms for trial in arm.trials)


def _result(trial: Trial) -> str:
    """Return the loss, followed by the metric that selects the setting if there is one."""
    score = "" if trial.score is None else f", {formatting.significant(trial.score, 4)}"
    return formatting.loss(trial.loss) + score


def _row(arm: TunedArm, trial: Trial) -> list[str]:
    marks = ["best"] if trial.number == arm.best else []
    marks += ["added by the extension"] if trial.added else []
    marks += [trial.reason] if trial.reason else []
    seconds = formatting.seconds(trial.seconds) if math.isfinite(trial.seconds) else formatting.MISSING
    own = [arm.label, str(trial.number), setting(trial.values), trial.state]
    return [*own, _result(trial), seconds, "; ".join(marks)]


def setting(values: Mapping[str, float | str]) -> str:
    """Return a setting as ``lr=0.004 rank=32``."""
    shown = {key: f"{value:g}" if isinstance(value, float) else str(value) for key, value in values.items()}
    return " ".join(f"{key}={value}" for key, value in shown.items())


def markdown(arms: Sequence[TunedArm]) -> str:
    """Return both tables as a Markdown file."""
    parts = ["# Tuning", ""]
    for table in (overview(arms), trial_table(arms)):
        parts += [*markdown_lines(table.heads, table.rows), ""]
    return "\n".join(parts)


def sensitivity(comparison: ComparisonSet) -> Plot | None:
    """Draw validation loss over learning rate, a line per optimizer; None if no learning rate was tuned."""
    arms = [(index, arm, _by_rate(arm.spent)) for index, arm in comparison.studies]
    arms = [(index, arm, points) for index, arm, points in arms if len({rate for rate, _ in points}) > 1]
    losses = [trial.loss for _, _, points in arms for _, trial in points if math.isfinite(trial.loss)]
    if not losses:
        return None
    top = min(max(losses), min(losses) + SPAN)
    top += 0.06 * max(top - min(losses), 0.01)
    traces, hidden = [], False
    for index, arm, points in arms:
        label = comparison.arms[index].label
        is_line = all(set(trial.values) <= {"lr", "aux_lr"} for _, trial in points)
        shown = [trial.loss if trial.loss <= top else top for _, trial in points]
        off = [not trial.loss <= top for _, trial in points]
        hidden |= any(off)
        symbols = [
            "x" if gone else "star" if t.number == arm.best else "circle"
            for gone, (_, t) in zip(off, points, strict=True)
        ]
        text = [
            f"{setting(t.values)}: {formatting.loss(t.loss) if math.isfinite(t.loss) else t.state}"
            for _, t in points
        ]
        traces.append(
            go.Scatter(
                x=[rate for rate, _ in points],
                y=shown,
                mode="lines+markers" if is_line else "markers",
                line=line(index),
                marker={"symbol": symbols, "size": [13 if s == "star" else 8 for s in symbols], "opacity": 1},
                name=label,
                text=text,
                hovertemplate="%{text}<extra>" + label + "</extra>",
                meta={"arm": index},
            )
        )
    rates = [rate for _, _, points in arms for rate, _ in points]
    dtick = 1 if max(rates) > 100 * min(rates) else "D2"
    built = figure(
        traces,
        xaxis={"title": {"text": "learning rate"}, "type": "log", "dtick": dtick},
        yaxis={"title": {"text": f"final validation loss ({loss_beside(comparison.measure).unit})"}},
        **plots.legend(comparison),
    )
    seeds = sorted({arm.seed for _, arm, _ in arms})
    seed = formatting.listing([str(seed) for seed in seeds])
    caption = (
        f"One point per trial, seed {seed}; a star marks the setting that was then compared on other seeds."
    )
    caption += " Crosses at the upper edge: diverged, or above the view." if hidden else ""
    return Plot("tuning", "Loss over learning rate", caption + plots.legend_note(comparison), built, 400)


def _by_rate(trials: list[Trial]) -> list[tuple[float, Trial]]:
    points = [(rate, t) for t in trials if isinstance(rate := t.values.get("lr"), float) and t.state in SPENT]
    return sorted(points, key=lambda point: point[0])
