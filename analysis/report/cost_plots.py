"""Stacked bars of what an optimizer costs: time per step, memory."""

from __future__ import annotations

import math
from typing import Any

import plotly.graph_objects as go

from analysis import formatting
from analysis.compare.comparison import ComparisonSet
from analysis.compare.tables import state_kinds
from analysis.pages.figures import Plot, figure
from analysis.report.plots import MAX_LEGEND
from harness.record.schema import TIME_PARTS


def step_time(chosen: ComparisonSet) -> Plot | None:
    """Stacked bars: where a step's time goes, mean over steps and seeds."""
    parts: dict[str, list[float]] = {}
    for part in TIME_PARTS:
        values = [arm.mean_time(part) * 1000 for arm in chosen.arms]
        if any(math.isfinite(value) and value > 0 for value in values):
            parts[part.replace("forward_backward", "forward and backward")] = values
    if not parts:
        return None
    built = _bars(chosen, parts, "milliseconds per step", "%{x:.3~g} ms")
    caption = "Mean over all steps but the first, so that the dear steps of a subspace refresh count."
    return Plot("step-time", "Where a step's time goes", caption, built, _bar_height(chosen))


def memory(chosen: ComparisonSet) -> Plot | None:
    """Stacked bars: bytes held for weights, gradients and the optimizer's state by kind."""
    mib = 2**20
    kinds: dict[str, list[float]] = {}
    for kind in ("weights", "gradients"):
        kinds[kind] = [arm.mean("memory_bytes", kind) / mib for arm in chosen.arms]
    states = [state_kinds((arm.finished or arm.runs)[0]) for arm in chosen.arms]
    for name in sorted({kind for state in states for kind in state}):
        label = f"state: {name.replace('_', ' ')}"
        kinds[label] = [state.get(name, 0.0) / mib if state else math.nan for state in states]
    kinds = {kind: v for kind, v in kinds.items() if any(math.isfinite(x) and x > 0 for x in v)}
    if not kinds:
        return None
    built = _bars(chosen, kinds, "MiB", "%{x:.3~g} MiB")
    peaks = [
        f"{a.label} {formatting.size(p)}"
        for a in chosen.arms
        if math.isfinite(p := a.mean("memory_bytes", "peak"))
    ]
    caption = "Counted from the tensors: weights and gradients at most over processes, state of rank 0."
    caption += (
        f" Measured peak of the process, activations and libraries included: {', '.join(peaks)}."
        if peaks and len(peaks) <= MAX_LEGEND
        else ""
    )
    return Plot("memory", "Memory by kind", caption, built, _bar_height(chosen))


def _bars(chosen: ComparisonSet, parts: dict[str, list[float]], unit: str, value: str) -> dict[str, Any]:
    labels = [arm.label for arm in chosen.arms]
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


def _bar_height(chosen: ComparisonSet) -> int:
    return 150 + (38 if len(chosen.arms) <= MAX_LEGEND else 20) * len(chosen.arms)
