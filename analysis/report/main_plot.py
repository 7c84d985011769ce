"""The first plot of a report: mean loss or metric with the range of seeds, zoomed on the end of training."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import plotly.graph_objects as go

from analysis import formatting
from analysis.comparison.sets import Arm, ComparisonSet
from analysis.formatting import to_jsonable
from analysis.pages.figures import MAX_POINTS, PALETTES, Plot, figure, line
from analysis.report.plots import absent_axes
from analysis.runs.curves import AXES, AXIS_TITLES, Curve, Floats, mean_curve, single_curve, thinned
from analysis.runs.measure import Measure, loss_beside

LABEL_HEIGHT = 17
"""Pixels from one label to the next at the ends of curves."""
MAX_LABELS = 60
"""Only the best curves are labelled; a taller plot would not fit a screen."""
FINISH = 0.6
"""The zoom on the end starts at this share of the run."""


def main_plot(comparison: ComparisonSet) -> Plot | None:
    """Draw what the set is compared by, as a mean with the range of seeds; None if no run logged a loss.

    It is the training loss if validation ran only at the end.
    """
    curves = {i: arm.curve for i, arm in enumerate(comparison.arms) if arm.curve is not None}
    if curves and max(len(curve.mean) for curve in curves.values()) > 1:
        return _plot(comparison, "main", comparison.measure, curves)
    loss = loss_beside(comparison.measure)
    return _plot(comparison, "main", replace(loss, split="train"), _curves(comparison, "train/loss"))


def validation_loss(comparison: ComparisonSet) -> Plot | None:
    """Draw the validation loss of a set that is compared by the metric of a task; None for other sets."""
    if comparison.measure.is_loss:
        return None
    loss = loss_beside(comparison.measure)
    return _plot(comparison, "validation-loss", loss, _curves(comparison, loss.key))


def _curves(comparison: ComparisonSet, key: str) -> dict[int, Curve]:
    curves = {i: mean_curve(arm.finished or arm.runs, key) for i, arm in enumerate(comparison.arms)}
    return {i: curve for i, curve in curves.items() if curve is not None}


def _plot(comparison: ComparisonSet, name: str, measure: Measure, curves: dict[int, Curve]) -> Plot | None:
    """Draw the curves of one measure; None where they share no axis."""
    axes = [axis for axis in AXES if curves and all(axis in curve.x for curve in curves.values())]
    if not axes:
        return None
    traces: list[Any] = []
    labels = []
    for index, curve in curves.items():
        keep = thinned(curve.mean, MAX_POINTS)
        x = {axis: curve.x[axis][keep] for axis in axes}
        if curve.seeds > 1:
            traces.append(_band(index, curve, keep, x, axes[0]))
        traces.append(_mean(index, comparison.arms[index], curve, keep, x, axes[0]))
        ends = {axis: float(curve.x[axis][-1]) for axis in axes}
        labels.append(
            {"arm": index, "text": comparison.arms[index].label, "y": float(curve.mean[-1]), "x": ends}
        )
    if len(labels) > MAX_LABELS:
        labels = sorted(labels, key=lambda label: -measure.sign * label["y"])[:MAX_LABELS]
    traces += _unfinished(comparison, measure.key, axes)
    is_compared = measure == comparison.measure
    unit = f" ({measure.unit})" if measure.unit else ""
    built = figure(
        traces,
        xaxis={"title": {"text": AXIS_TITLES[axes[0]]}},
        yaxis={"title": {"text": f"{measure.title}{unit}"}},
        hovermode="x unified",
        showlegend=False,
        meta={
            "main": True,
            "labels": labels,
            "ranges": {axis: _ranges(comparison, curves, axis) for axis in axes},
            "titles": {axis: AXIS_TITLES[axis] for axis in axes},
            "entropy": to_jsonable(comparison.entropy),
            "target": to_jsonable(comparison.target) if is_compared else None,
        },
    )
    seeds = max(curve.seeds for curve in curves.values())
    band = (
        f"Lines: mean over {seeds} seeds; bands: lowest to highest seed."
        if seeds > 1
        else "One seed per line."
    )
    stopped = (
        " Thin lines that end in a cross: runs that did not finish." if _any_unfinished(comparison) else ""
    )
    learned = _learned(comparison, curves)
    hidden = [comparison.arms[i].label for i, curve in curves.items() if not any(curve is c for c in learned)]
    above = f" Above the view of the finish: {formatting.listing(hidden)}." if hidden else ""
    title = measure.title.capitalize()
    named = [(comparison.arms[i].label, curve) for i, curve in curves.items()]
    caption = band + stopped + above + absent_axes(named, axes)
    height = max(480, 80 + LABEL_HEIGHT * min(len(labels), MAX_LABELS))
    return Plot(name, title, caption, built, height, axes=axes)


def _learned(comparison: ComparisonSet, curves: dict[int, Curve]) -> list[Curve]:
    """Return the curves that end below the unigram entropy, or all of them if none does."""
    return [c for c in curves.values() if c.mean[-1] < comparison.entropy] or list(curves.values())


def _mean(index: int, arm: Arm, curve: Curve, keep: Any, x: dict[str, Floats], axis: str) -> go.Scatter:
    has_markers = len(keep) <= 40
    return go.Scatter(
        x=x[axis],
        y=curve.mean[keep],
        name=arm.label,
        mode="lines+markers" if has_markers else "lines",
        marker={"size": 5},
        line=line(index),
        hovertemplate="%{y:.4f}",
        meta={"arm": index, "x": to_jsonable(x)},
    )


def _band(index: int, curve: Curve, keep: Any, x: dict[str, Floats], axis: str) -> go.Scatter:
    outline = {name: np.concatenate([values, values[::-1]]) for name, values in x.items()}
    return go.Scatter(
        x=outline[axis],
        y=np.concatenate([curve.high[keep], curve.low[keep][::-1]]),
        fill="toself",
        mode="none",
        opacity=0.18,
        fillcolor=PALETTES["light"][index % len(PALETTES["light"])],
        hoverinfo="skip",
        meta={"arm": index, "band": True, "x": to_jsonable(outline)},
    )


def _any_unfinished(comparison: ComparisonSet) -> bool:
    return any(not run.finished for arm in comparison.arms for run in arm.runs)


def _unfinished(comparison: ComparisonSet, key: str, axes: list[str]) -> list[Any]:
    traces = []
    for index, arm in enumerate(comparison.arms):
        for run in arm.runs:
            curve = None if run.finished else single_curve(run, key)
            if curve is None or any(axis not in curve.x for axis in axes):
                continue
            keep = thinned(curve.mean, MAX_POINTS // 2)
            x = {axis: curve.x[axis][keep] for axis in axes}
            symbols = ["circle"] * (len(keep) - 1) + ["x"]
            traces.append(
                go.Scatter(
                    x=x[axes[0]],
                    y=curve.mean[keep],
                    mode="lines+markers",
                    line={**line(index, 1.0)},
                    marker={"symbol": symbols, "size": [0] * (len(keep) - 1) + [10]},
                    opacity=0.8,
                    name=f"{arm.label} seed {run.seed}: {run.state}",
                    hovertemplate="%{y:.4f}",
                    meta={"arm": index, "x": to_jsonable(x)},
                )
            )
    return traces


def _ranges(comparison: ComparisonSet, curves: dict[int, Curve], axis: str) -> dict[str, Any]:
    """Return the axis limits of the whole run and of its end.

    Curves above the unigram entropy do not extend the limits of the end: they would flatten the others.
    """
    learned = _learned(comparison, curves)
    ends = [float(curve.x[axis][-1]) for curve in curves.values()]
    start = FINISH * min(ends)
    late = [values[curve.x[axis] >= start] for curve in learned for values in (curve.high, curve.low)]
    low, high = min(v.min() for v in late), max(v.max() for v in late)
    pad = 0.06 * max(high - low, 1e-3)
    everything = [v for curve in curves.values() for v in (curve.low.min(), curve.high.max())]
    bottom, top = (
        min(everything),
        max([*everything, *([comparison.entropy] if comparison.entropy < 50 else [])]),
    )
    margin = 0.04 * max(top - bottom, 1e-3)
    return {
        "finish": {"x": [start, max(ends)], "y": [low - pad, high + pad]},
        "whole": {"x": [0, max(ends)], "y": [bottom - margin, top + margin]},
    }
