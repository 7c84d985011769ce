"""Figures of a margin job, as plain dictionaries that the report's page colours (`analysis.pages.figures`)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go

from analysis.margin.trajectory import MarginRun, TrajectoryRow
from analysis.pages.figures import GREY, MAX_POINTS, Plot, figure, line

LN10 = math.log(10.0)
LOG_STEP = "log₁₀ step"
NORM_SYMBOLS = {"l2": "ℓ2", "linf": "ℓ∞"}
FEW = 5
"""So few points are marked: checkpoints, which a line alone would hide."""
Value = Callable[[TrajectoryRow], float | None]


def shown_runs(runs: Sequence[MarginRun]) -> list[MarginRun]:
    """Return one run per optimizer: the first that separates the points, else the first."""
    names = dict.fromkeys(run.optimizer for run in runs)
    alive = [run for run in runs if run.status in ("ok", "flat")]
    return [next(run for run in (*alive, *runs) if run.optimizer == name) for name in names]


def toy_plots(runs: Sequence[MarginRun]) -> list[Plot]:
    """Return all plots of the modes `toy` and `flow`."""
    shown = shown_runs(runs)
    plots = [
        _margin(shown),
        _inverse_gap(shown),
        _product(shown),
        _delta(shown),
        _log_log(shown),
        _by_loss(shown),
    ]
    constants = [
        run.predicted for run in runs if run.predicted is not None and run.optimizer == runs[0].optimizer
    ]
    if len(constants) > 2:
        plots.append(_histogram(runs[0].optimizer, constants))
    return [plot for plot in plots if plot is not None]


def log10_t(row: TrajectoryRow) -> float | None:
    """Return log₁₀ of the step; None at the start."""
    if row["t"] is None:
        return None
    return math.log10(row["t"]) if row["t"] > 0 else None


def curves(runs: Sequence[MarginRun], x: Value, y: Value) -> list[Any]:
    """Return a trace per run, without the rows where x or y is missing."""
    traces = []
    for arm, run in enumerate(runs):
        pairs = [(x(row), y(row)) for row in run.rows]
        points = [(a, b) for a, b in pairs if a is not None and b is not None and math.isfinite(a + b)]
        if points:
            traces.append(_trace(arm, run.optimizer, points))
    return traces


def _trace(arm: int, name: str, points: Sequence[tuple[float, float]], **more: Any) -> Any:
    keep = np.unique(np.linspace(0, len(points) - 1, min(len(points), MAX_POINTS)).astype(int))
    return go.Scatter(
        x=[points[i][0] for i in keep],
        y=[points[i][1] for i in keep],
        mode="lines" if len(points) > FEW else "lines+markers",
        name=name,
        line=line(arm),
        hovertemplate=f"{name}: %{{y:.5g}}<extra></extra>",
        meta={"arm": arm},
        **more,
    )


def _level(value: float, text: str) -> dict[str, Any]:
    """Return the layout of a named horizontal line."""
    return {
        "shapes": [
            {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": value, "y1": value}
            | {"line": {"color": GREY, "width": 1, "dash": "dash"}}
        ],
        "annotations": [
            {"xref": "paper", "x": 1, "xanchor": "right", "y": value, "yanchor": "bottom", "text": text}
            | {"showarrow": False, "font": {"size": 12, "color": GREY}}
        ],
    }


def axes(x: str, y: str, **more: Any) -> dict[str, Any]:
    """Return the layout of both axes: titles, and more keys of the y axis."""
    return {"xaxis": {"title": {"text": x}}, "yaxis": {"title": {"text": y}, **more}}


def _margin(runs: Sequence[MarginRun]) -> Plot:
    best = float(runs[0].facts["margin_opt"])
    built = figure(
        curves(runs, log10_t, lambda r: r["margin"]), **axes(LOG_STEP, "margin"), **_level(best, "optimum")
    )
    caption = (
        "Exact distance from the points to the decision boundary. A margin that falls first is not an error."
    )
    return Plot("margin", "Margin", caption, built, 360)


def _inverse_gap(runs: Sequence[MarginRun]) -> Plot:
    def inverse(row: TrajectoryRow) -> float | None:
        return 1.0 / row["gap"] if row["gap"] > 1e-9 and row["f_min"] > 0.0 else None

    traces = curves(runs, log10_t, inverse)
    slow = [run for run in runs if run.optimizer == "gd"]
    for run in slow:
        x, y = log10_t(run.rows[-1]), inverse(run.rows[-1])
        if run.predicted and x is not None and y is not None:
            ends = (max(0.0, x - 0.6 * x), x)
            line_y = [y - (x - end) * LN10 / run.predicted for end in ends]
            traces.append(
                go.Scatter(
                    x=ends, y=line_y, mode="lines", name=f"slope 1/C, C = {run.predicted:.4g}", hoverinfo="skip",
                    line={"color": GREY, "dash": "dot", "width": 1.6},
                )
            )  # fmt: skip
    top = max((v for run in slow for row in run.rows if (v := inverse(row)) is not None), default=None)
    scale = {"range": [0.0, 1.5 * top]} if top and len(runs) > 1 else {}
    built = figure(traces, **axes(LOG_STEP, "1 / gap", **scale))
    caption = "A rate of 1/ln t is a straight line here, with slope 1/C per e-fold; a power of t bends upwards at once."
    return Plot("inverse-gap", "1/gap against ln t", caption, built, 360)


def _product(runs: Sequence[MarginRun]) -> Plot:
    def product(row: TrajectoryRow) -> float | None:
        t = log10_t(row)
        return row["gap"] * t * LN10 if t else None

    built = figure(curves(runs, log10_t, product), **axes(LOG_STEP, "gap · ln t"))
    caption = (
        "Tends to C under gradient descent, but only as fast as 1/ln t itself: read C off the slope above."
    )
    return Plot("product", "gap · ln t", caption, built, 300)


def _delta(runs: Sequence[MarginRun]) -> Plot | None:
    traces = curves(runs, log10_t, lambda r: r.get("delta_b"))
    if not traces:
        return None
    first = next((run for run in runs if run.optimizer in ("gd", "adam", "adamw") and run.predicted), None)
    level = _level(float(first.predicted), f"C = {first.predicted:.4g}") if first and first.predicted else {}
    built = figure(traces, **axes(LOG_STEP, "|b₂ − b₁|"), **level)
    caption = (
        "Sign and spectral descent do not change the difference of the biases; gradient descent moves it to C. "
        "Adam does, too, once gradients are smaller than its ε."
    )
    return Plot("delta-b", "Difference of the biases", caption, built, 340)


def _log_log(runs: Sequence[MarginRun]) -> Plot:
    def small(row: TrajectoryRow) -> float | None:
        return row["gap"] if row["gap"] > 1e-13 else None

    built = figure(
        curves(runs, log10_t, small), **axes(LOG_STEP, "gap", type="log", exponentformat="power", dtick=1)
    )
    return Plot("log-log", "Gap, both axes logarithmic", "A power of t is a straight line here.", built, 340)


def _by_loss(runs: Sequence[MarginRun]) -> Plot:
    def height(row: TrajectoryRow) -> float | None:
        return -row["log_loss"] if row["log_loss"] < 0.0 else None

    def small(row: TrajectoryRow) -> float | None:
        return row["gap"] if row["gap"] > 1e-13 else None

    axes = {
        "xaxis": {"title": {"text": "−ln loss"}, "type": "log"},
        "yaxis": {"title": {"text": "gap"}, "type": "log"},
    }
    built = figure(curves(runs, height, small), **axes)
    caption = (
        "At equal loss gradient descent and its normalized form have the same gap: it only gets there sooner."
    )
    return Plot("by-loss", "Gap at equal loss", caption, built, 340)


def _histogram(name: str, constants: Sequence[float]) -> Plot:
    trace = go.Histogram(
        x=list(constants), nbinsx=40, name=name, marker={"color": line(0)["color"]}, meta={"arm": 0}
    )
    built = figure([trace], **axes("C", "runs that separate the points"), showlegend=False)
    mean = float(np.mean(constants))
    caption = f"{len(constants)} starts; mean {mean:.4f}, median {float(np.median(constants)):.4f}."
    return Plot("constants", "C over random starts", caption, built, 300)
