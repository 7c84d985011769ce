"""Final loss of every tuning trial over its learning rate: how much an optimizer forgives."""

from __future__ import annotations

import math

import plotly.graph_objects as go

from analysis import formatting
from analysis.compare.comparison import ComparisonSet
from analysis.pages.figures import Plot, figure, line
from analysis.report import plots
from analysis.report.tuning_tables import of_set, setting
from analysis.runs.tuning_ledger import SPENT, Trial

SPAN = 1.5
"""Trials that ended this far (nats) above the lowest would press the others together: they stand at the upper edge."""


def sensitivity(chosen: ComparisonSet) -> Plot | None:
    """Validation loss over learning rate, a line per optimizer; None if no learning rate was tuned."""
    arms = [(index, arm, _by_rate(arm.spent)) for index, arm in of_set(chosen)]
    arms = [(index, arm, points) for index, arm, points in arms if len({rate for rate, _ in points}) > 1]
    losses = [trial.loss for _, _, points in arms for _, trial in points if math.isfinite(trial.loss)]
    if not losses:
        return None
    top = min(max(losses), min(losses) + SPAN)
    top += 0.06 * max(top - min(losses), 0.01)
    traces, hidden = [], False
    for index, arm, points in arms:
        label = chosen.arms[index].label
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
        yaxis={"title": {"text": "final validation loss (nats/token)"}},
        **plots.legend(chosen),
    )
    seeds = sorted({arm.seed for _, arm, _ in arms})
    seed = formatting.listing([str(seed) for seed in seeds])
    caption = f"One trial a point, seed {seed}; the star is the setting that was compared, on other seeds."
    caption += " Crosses at the upper edge: diverged, or above the view." if hidden else ""
    return Plot("tuning", "Loss over learning rate", caption + plots.unnamed(chosen), built, 400)


def _by_rate(trials: list[Trial]) -> list[tuple[float, Trial]]:
    points = [(rate, t) for t in trials if isinstance(rate := t.values.get("lr"), float) and t.state in SPENT]
    return sorted(points, key=lambda point: point[0])
