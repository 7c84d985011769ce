"""Figures of a margin job, as plain dictionaries that the report's page colours (`analysis.pages.figures`)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go

from analysis.margin.trajectory import MarginRun, TrajectoryRow
from analysis.pages.figures import GREY, MAX_POINTS, Plot, decades, figure, line

LN10 = math.log(10.0)
NORM_SYMBOLS = {"l2": "ℓ2", "linf": "ℓ∞"}
FEW = 5
"""So few points are marked: checkpoints, which a line alone would hide."""
SMALLEST = 1e-13
"""Gaps below this are rounding."""
Value = Callable[[TrajectoryRow], float | None]


def shown_runs(runs: Sequence[MarginRun]) -> list[MarginRun]:
    """Return one run per optimizer: the first that separates the points, else the first."""
    names = dict.fromkeys(run.optimizer for run in runs)
    alive = [run for run in runs if run.status in ("ok", "flat")]
    return [next(run for run in (*alive, *runs) if run.optimizer == name) for name in names]


def toy_plots(runs: Sequence[MarginRun]) -> list[Plot]:
    """Return all plots of the modes `toy` and `flow`."""
    shown = [run for run in shown_runs(runs) if run.rows]
    if not shown:
        return []
    plots = [_inverse_gap(shown), _margin(shown), _delta(shown)]
    if len(shown) > 1:
        plots += [_log_log(shown), _by_loss(shown)]
    plots.append(_constants(runs))
    return [plot for plot in plots if plot is not None]


def step(row: TrajectoryRow) -> float | None:
    """Return the step; None at the start, which no logarithmic axis has."""
    return row["t"] or None


def curves(runs: Sequence[MarginRun], x: Value, y: Value) -> list[Any]:
    """Return a trace per run, without the rows where x or y is missing."""
    traces = []
    for arm, run in enumerate(runs):
        pairs = [(x(row), y(row)) for row in run.rows]
        points = [(a, b) for a, b in pairs if a is not None and b is not None and math.isfinite(a + b)]
        if points:
            traces.append(_trace(arm, run.optimizer, points))
    return traces


def _trace(arm: int, name: str, points: Sequence[tuple[float, float]]) -> Any:
    keep = np.unique(np.linspace(0, len(points) - 1, min(len(points), MAX_POINTS)).astype(int))
    return go.Scatter(
        x=[points[i][0] for i in keep],
        y=[points[i][1] for i in keep],
        mode="lines" if len(points) > FEW else "lines+markers",
        name=name,
        line=line(arm),
        hovertemplate=f"{name}: %{{y:.5g}}<extra></extra>",
        meta={"arm": arm},
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


def log_axis(title: str, traces: Sequence[Any], axis: str) -> dict[str, Any]:
    """Return the layout of a logarithmic axis over the values of traces."""
    values = [value for trace in traces for value in getattr(trace, axis)]
    return decades(title, min(values), max(values)) if values else {"title": {"text": title}}


def step_axes(traces: Sequence[Any], y: str, **more: Any) -> dict[str, Any]:
    """Return the layout of both axes: steps on a logarithmic one, the title and more keys of the other."""
    return {"xaxis": log_axis("step", traces, "x"), "yaxis": {"title": {"text": y}, **more}}


def _inverse_gap(runs: Sequence[MarginRun]) -> Plot:
    def inverse(run: MarginRun) -> list[tuple[float, float]]:
        # The start may be at the optimum: what comes before the largest gap would hide the line.
        peak = run.facts.get("gap_peak_ln_tau")
        late = [row for row in run.rows if peak is not None and row["ln_tau"] >= peak and row["t"]]
        return [(row["t"], 1.0 / row["gap"]) for row in late if row["gap"] > 1e-9 and row["f_min"] > 0.0]

    points = {arm: inverse(run) for arm, run in enumerate(runs)}
    traces = [_trace(arm, runs[arm].optimizer, pairs) for arm, pairs in points.items() if pairs]
    top = 0.0
    for arm, run in enumerate(runs):
        if run.optimizer != "gd" or not points[arm]:
            continue
        top = max(top, max(y for _, y in points[arm]))
        if run.predicted:
            (x, y), first = points[arm][-1], points[arm][0][0]
            start = max(first, x**0.05)
            fitted = f", fitted {run.rate.constant:.4g}" if run.rate.constant else ""
            traces.append(
                go.Scatter(
                    x=[start, x], y=[y - math.log(x / start) / run.predicted, y], mode="lines", hoverinfo="skip",
                    name=f"slope 1/C, C = {run.predicted:.4g} predicted{fitted}",
                    line={"color": GREY, "dash": "dot", "width": 1.6},
                )
            )  # fmt: skip
    scale = {"range": [0.0, 1.15 * top]} if top else {}
    caption = (
        "From the largest gap on. A rate of 1/ln t is a straight line here, with slope 1/C per e-fold of steps; a "
        "power of t leaves the plot at once."
    )
    return Plot(
        "inverse-gap",
        "1/gap against ln t",
        caption,
        figure(traces, **step_axes(traces, "1 / gap", **scale)),
        380,
    )


def _margin(runs: Sequence[MarginRun]) -> Plot:
    best = float(runs[0].facts["margin_opt"])
    traces = curves(runs, step, lambda r: r["margin"])
    built = figure(traces, **step_axes(traces, "margin"), **_level(best, "optimum"))
    caption = (
        "Exact distance from the points to the decision boundary. A margin that falls first is not an error."
    )
    return Plot("margin", "Margin", caption, built, 340)


def _delta(runs: Sequence[MarginRun]) -> Plot | None:
    traces = curves(runs, step, lambda r: r.get("delta_b"))
    if not traces:
        return None
    first = next((run for run in runs if run.optimizer in ("gd", "adam", "adamw") and run.predicted), None)
    level = _level(float(first.predicted), f"C = {first.predicted:.4g}") if first and first.predicted else {}
    caption = (
        "The gap is |b₂ − b₁|/(w₁ − w₂). Sign and spectral descent do not change the difference of the biases; "
        "gradient descent moves it to C, which may be more or less. Adam does, too, once gradients "
        "are smaller than its ε."
    )
    return Plot(
        "delta-b", "Difference of the biases", caption,
        figure(traces, **step_axes(traces, "|b₂ − b₁|"), **level), 340,
    )  # fmt: skip


def _small(row: TrajectoryRow) -> float | None:
    return row["gap"] if row["gap"] > SMALLEST else None


def _log_log(runs: Sequence[MarginRun]) -> Plot:
    traces = curves(runs, step, _small)
    built = figure(traces, xaxis=log_axis("step", traces, "x"), yaxis=log_axis("gap", traces, "y"))
    return Plot("log-log", "Gap over steps", "A power of t is a straight line here.", built, 340)


def _by_loss(runs: Sequence[MarginRun]) -> Plot:
    traces = curves(runs, lambda row: -row["log_loss"] if row["log_loss"] < 0.0 else None, _small)
    built = figure(traces, xaxis=log_axis("−ln loss", traces, "x"), yaxis=log_axis("gap", traces, "y"))
    caption = (
        "At equal loss gradient descent and its normalized form have the same gap: it only gets there sooner. Which "
        "other optimizer has the smaller gap depends on the start."
    )
    return Plot("by-loss", "Gap at equal loss", caption, built, 340)


def _constants(runs: Sequence[MarginRun]) -> Plot | None:
    """Return the distribution of the predicted constants over random starts; None for fewer than three."""
    traces = []
    for arm, name in enumerate(dict.fromkeys(run.optimizer for run in runs)):
        values = sorted(run.predicted for run in runs if run.optimizer == name and run.predicted is not None)
        if len(values) > 2:
            shares = [(i + 1) / len(values) for i in range(len(values))]
            traces.append(_trace(arm, f"{name} ({len(values)} starts)", list(zip(values, shares))))
    if not traces:
        return None
    built = figure(
        traces,
        xaxis={"title": {"text": "constant C"}},
        yaxis={"title": {"text": "share of starts with less"}},
    )
    caption = (
        "Predicted from the first state in which each neuron is active at one point alone: |w₁ + w₂ + b₂ − b₁|/2 for "
        "gradient descent and its normalized form, |b₂ − b₁| for sign and spectral descent."
    )
    return Plot("constants", "Constants over random starts", caption, built, 320)
