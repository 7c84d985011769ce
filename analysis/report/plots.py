"""Plots of training loss, step time and memory, and what all plots of a comparison share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go

from analysis import formatting
from analysis.comparison.results_table import state_kinds
from analysis.comparison.sets import ComparisonSet
from analysis.formatting import to_jsonable
from analysis.pages.figures import MAX_POINTS, Plot, figure, line
from analysis.runs.curves import AXES, AXIS_TITLES, Curve, single_curve, thinned
from analysis.runs.measure import loss_beside
from harness.record.schema import TIME_PARTS

AXIS_WORDS = {"flops": "FLOPs"}
ALL_POINTS = 12_000
"""Most points of a plot with a line per run: more of them make a browser slow."""
MAX_LEGEND = 12
"""Most arms in a legend; more of them would take the place of the plot."""


def legend(comparison: ComparisonSet) -> dict[str, bool]:
    """Return the layout of a plot whose traces are arms."""
    return {"showlegend": len(comparison.arms) <= MAX_LEGEND}


def legend_note(comparison: ComparisonSet) -> str:
    """Return what a caption states in place of a legend."""
    has_legend = len(comparison.arms) <= MAX_LEGEND
    return "" if has_legend else " Colours and dashes as in the table; the pointer shows names."


def training_loss(comparison: ComparisonSet) -> Plot | None:
    """Draw the training loss of every run over tokens, steps, seconds or FLOPs; None if no run logged it."""
    points = min(MAX_POINTS, max(60, ALL_POINTS // len(comparison.runs)))
    curves = [
        (index, arm, run, curve)
        for index, arm in enumerate(comparison.arms)
        for run in arm.runs
        if (curve := single_curve(run, "train/loss")) is not None
    ]
    axes = [axis for axis in AXES if curves and all(axis in curve.x for *_, curve in curves)]
    if not axes:
        return None
    traces, named = [], set()
    for index, arm, run, curve in curves:
        keep = thinned(curve.mean, points)
        x = {axis: curve.x[axis][keep] for axis in axes}
        traces.append(
            go.Scatter(
                x=x[axes[0]],
                y=curve.mean[keep],
                mode="lines",
                line=line(index, 1.2),
                opacity=0.85,
                name=arm.label,
                legendgroup=arm.label,
                showlegend=arm.label not in named,
                hovertemplate=f"seed {run.seed}: %{{y:.4f}} at %{{x}}<extra>{arm.label}</extra>",
                meta={"arm": index, "x": to_jsonable(x)},
            )
        )
        named.add(arm.label)
    built = figure(
        traces,
        xaxis={"title": {"text": AXIS_TITLES[axes[0]]}},
        yaxis={"title": {"text": f"training loss ({loss_beside(comparison.measure).unit})"}},
        meta={"titles": {axis: AXIS_TITLES[axis] for axis in axes}},
        **legend(comparison),
    )
    caption = "One line per run."
    if "seconds" in axes:
        caption += " Seconds are those of training with its evaluations and probes, over all attempts."
    caption += absent_axes([(arm.label, curve) for _, arm, _, curve in curves], axes) + legend_note(
        comparison
    )
    return Plot("training-loss", "Training loss", caption, built, 380, axes=axes)


def absent_axes(curves: Sequence[tuple[str, Curve]], axes: Sequence[str]) -> str:
    """Return which axes are not available, and the arms that lack them."""
    text = ""
    for axis in AXES:
        lacking = list(dict.fromkeys(label for label, curve in curves if axis not in curve.x))
        if axis not in axes and any(axis in curve.x for _, curve in curves):
            verb = "record" if len(lacking) > 1 else "records"
            text += f" Not over {AXIS_WORDS.get(axis, axis)}: {formatting.listing(lacking[:6])} {verb} none."
    return text


def step_time(comparison: ComparisonSet) -> Plot | None:
    """Draw stacked bars of the time per step by part, averaged over steps and seeds."""
    parts: dict[str, list[float]] = {}
    for part in TIME_PARTS:
        values = [arm.mean_time(part) * 1000 for arm in comparison.arms]
        if any(math.isfinite(value) and value > 0 for value in values):
            parts[part.replace("forward_backward", "forward and backward")] = values
    if not parts:
        return None
    built = _bars(comparison, parts, "milliseconds per step", "%{x:.3~g} ms")
    caption = "Mean over all steps but the first, including the expensive steps of a subspace refresh."
    return Plot("step-time", "Time per step by part", caption, built, _bar_height(comparison))


def memory(comparison: ComparisonSet) -> Plot | None:
    """Draw stacked bars of the bytes of weights, gradients and optimizer state by kind."""
    mib = 2**20
    kinds: dict[str, list[float]] = {}
    for kind in ("weights", "gradients"):
        kinds[kind] = [arm.mean("memory_bytes", kind) / mib for arm in comparison.arms]
    states = [state_kinds((arm.finished or arm.runs)[0]) for arm in comparison.arms]
    for name in sorted({kind for state in states for kind in state}):
        label = f"state: {name.replace('_', ' ')}"
        kinds[label] = [state.get(name, 0.0) / mib if state else math.nan for state in states]
    kinds = {kind: v for kind, v in kinds.items() if any(math.isfinite(x) and x > 0 for x in v)}
    if not kinds:
        return None
    built = _bars(comparison, kinds, "MiB", "%{x:.3~g} MiB")
    peaks = [
        f"{a.label} {formatting.size(p)}"
        for a in comparison.arms
        if math.isfinite(p := a.mean("memory_bytes", comparison.peak_kind))
    ]
    caption = "Counted from the tensors: weights and gradients are the maximum over processes, state is that of rank 0."
    caption += (
        f" Measured peak of the process, activations and libraries included: {', '.join(peaks)}."
        if peaks and len(peaks) <= MAX_LEGEND
        else ""
    )
    return Plot("memory", "Memory by kind", caption, built, _bar_height(comparison))


def _bars(comparison: ComparisonSet, parts: dict[str, list[float]], unit: str, value: str) -> dict[str, Any]:
    labels = [arm.label for arm in comparison.arms]
    traces = [
        go.Bar(
            y=labels,
            x=values,
            name=name,
            orientation="h",
            hovertemplate=f"{value}<extra>{name}</extra>",
            meta={"part": index},
        )
        for index, (name, values) in enumerate(parts.items())
    ]
    return figure(
        traces,
        barmode="stack",
        bargap=0.35,
        xaxis={"title": {"text": unit}},
        yaxis={"autorange": "reversed", "type": "category"},
        legend={"traceorder": "normal"},
        meta={"bars": True},
    )


def _bar_height(comparison: ComparisonSet) -> int:
    return 150 + (38 if len(comparison.arms) <= MAX_LEGEND else 20) * len(comparison.arms)
