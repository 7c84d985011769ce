"""Plots of the moments' spectra: over training, over depth, and layer by layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import plotly.graph_objects as go

from analysis.compare.comparison import ComparisonSet
from analysis.pages.figures import Plot, figure, line
from analysis.report.plots import legend, unnamed
from analysis.report.spectra import FIGURES, Spectra, block, fold, short, spectra
from analysis.runs.curves import Floats

STATS = (("median", np.nanmedian, 2.2), ("largest", np.nanmax, 0.9))
MAX_STEPS, MIN_STEPS = 120, 12
MAX_CELLS = 150_000
"""Cells of all heat maps together: they are most of the page's weight."""
Found = Mapping[int, Spectra]
"""Index of the arm → its figures; arms that recorded none are absent."""


def find(chosen: ComparisonSet) -> Found:
    """The figures of all arms of a set."""
    found = {index: spectra(arm) for index, arm in enumerate(chosen.arms)}
    return {index: values for index, values in found.items() if values is not None}


def over_steps(chosen: ComparisonSet, found: Found) -> dict[str, Plot]:
    """Every figure over steps that some arm recorded."""
    plots = {}
    for name, shown in FIGURES.items():
        traces: list[Any] = []
        for index, values in _having(found, name):
            for stat, reduce, width in STATS:
                ys = fold(reduce, values.values[name], 1)
                kept = np.isfinite(ys)
                label = chosen.arms[index].label
                traces.append(_trace(index, label, stat, values.steps[kept], ys[kept], width, "at step"))
        if traces:
            built = _lines(chosen, traces, name, {"title": {"text": "optimizer steps"}})
            caption = f"{shown.caption} Thick: median over matrices; thin: the largest. Median over seeds."
            caption += unnamed(chosen)
            plots[name] = Plot(f"{name.replace('_', '-')}", shown.title, caption, built, 340)
    return plots


def over_depth(chosen: ComparisonSet, found: Found) -> dict[str, Plot]:
    """Every figure over the blocks of the model, at each arm's last probe; none for a model of one block."""
    plots = {}
    for name, shown in FIGURES.items():
        traces: list[Any] = []
        steps = set()
        for index, values in _having(found, name):
            profile = _profile(values, name)
            if profile is None:
                continue
            step, blocks, by_block = profile
            steps.add(f"{step:g}")
            for stat, reduce, width in STATS:
                ys = np.array([float(reduce(v)) for v in by_block])
                label = chosen.arms[index].label
                traces.append(_trace(index, label, stat, np.array(blocks, float), ys, width, "in block"))
        if traces:
            blocks = [round(x) for trace in traces for x in trace.x]
            xaxis = {"title": {"text": "block of the model"}, "dtick": 1 + (max(blocks) - min(blocks)) // 12}
            built = _lines(chosen, traces, name, {**xaxis, "tick0": min(blocks)})
            at = f"step {steps.pop()}" if len(steps) == 1 else "each optimizer's last probed step"
            caption = f"At {at}. Thick: median over the matrices of a block; thin: the largest."
            title = f"{shown.axis.capitalize()} over depth"
            plots[name] = Plot(f"{name.replace('_', '-')}-depth", title, caption, built, 340)
    return plots


def heat_map(chosen: ComparisonSet, found: Found) -> Plot | None:
    """A figure of every matrix over steps, one figure and one optimizer at a time; None where nothing was
    probed.
    """
    names = [name for name in FIGURES if any(True for _ in _having(found, name))]
    if not names:
        return None
    arms = list(found)
    room = MAX_CELLS // max(sum(len(found[i].layers) for i in arms) * len(names), 1)
    steps = min(MAX_STEPS, max(MIN_STEPS, room))
    traces = []
    for number, name in enumerate(names):
        grids = {i: grid for i, values in _having(found, name) if (grid := _grid(values, name, steps))}
        if not grids:
            continue
        low = min(float(np.nanmin(z)) for _, _, z in grids.values())
        high = max(float(np.nanmax(z)) for _, _, z in grids.values())
        for index, grid in grids.items():
            traces.append(_heat(grid, name, (low, high), [number, arms.index(index)]))
    if not traces:
        return None
    built = figure(
        traces,
        xaxis={"title": {"text": "optimizer steps"}, "type": "category"},
        yaxis={"autorange": "reversed", "type": "category"},
        meta={"heat": True},
    )
    caption = "A row per matrix, first block on top; one colour scale for all optimizers. Median over seeds."
    rows = max(len(trace.y) for trace in traces)
    choices = {
        "Figure": [FIGURES[name].axis for name in names],
        "Optimizer": [chosen.arms[index].label for index in arms],
    }
    return Plot("heat", "Matrix by matrix", caption, built, 130 + min(max(16 * rows, 160), 720), choices)


def _having(found: Found, name: str) -> list[tuple[int, Spectra]]:
    return [(index, values) for index, values in found.items() if name in values.values]


def _trace(arm: int, label: str, stat: str, x: Floats, y: Floats, width: float, where: str) -> go.Scatter:
    return go.Scatter(
        x=x,
        y=y,
        name=label,
        legendgroup=label,
        showlegend=stat == "median",
        mode="lines+markers" if len(x) < 30 and stat == "median" else "lines",
        marker={"size": 4},
        line=line(arm, width),
        hovertemplate=f"{stat}: %{{y:.3~g}} {where} %{{x}}<extra>{label}</extra>",
        meta={"arm": arm},
    )


def _lines(chosen: ComparisonSet, traces: list[Any], name: str, xaxis: dict[str, Any]) -> dict[str, Any]:
    shown, scale = FIGURES[name], {"rangemode": "tozero"}
    if shown.logarithmic:
        values = np.concatenate([np.asarray(trace.y, float) for trace in traces])
        values = values[values > 0]
        wide = not len(values) or values.max() > 100 * values.min()
        scale = {"type": "log", "exponentformat": "power", "dtick": 1 if wide else "D2"}
    return figure(traces, xaxis=xaxis, yaxis={"title": {"text": shown.axis}, **scale}, **legend(chosen))


def _profile(found: Spectra, name: str) -> tuple[float, list[int], list[Floats]] | None:
    """Last step with any value, the blocks, and the values of each; None for less than two blocks."""
    values = found.values[name]
    last = int(np.flatnonzero(np.isfinite(values).any(1))[-1])
    by_block: dict[int, list[float]] = {}
    for layer, value in zip(found.layers, values[last], strict=True):
        number = block(layer)
        if number is not None and np.isfinite(value):
            by_block.setdefault(number, []).append(float(value))
    if len(by_block) < 2:
        return None
    blocks = sorted(by_block)
    return float(found.steps[last]), blocks, [np.array(by_block[b]) for b in blocks]


def _heat(
    grid: tuple[Floats, list[str], Floats], name: str, limits: tuple[float, float], choice: list[int]
) -> go.Heatmap:
    steps, layers, values = grid
    shown = FIGURES[name]
    axis = f"log10 {shown.axis}" if shown.logarithmic else shown.axis
    return go.Heatmap(
        z=np.round(values.T, 3 if shown.logarithmic else 1),
        x=[f"{step:g}" for step in steps],
        y=[short(layer) for layer in layers],
        zmin=limits[0],
        zmax=limits[1],
        colorscale="Cividis",
        colorbar={"title": {"text": axis, "side": "right"}, "thickness": 12},
        visible=choice == [0, 0],
        hovertemplate=f"%{{y}}, step %{{x}}: {axis} %{{z}}<extra></extra>",
        meta={"choice": choice},
    )


def _grid(found: Spectra, name: str, steps: int) -> tuple[Floats, list[str], Floats] | None:
    """Steps, layers and values (log10 where the axis is logarithmic), empty rows and columns left out."""
    values = found.values[name]
    if FIGURES[name].logarithmic:
        values = np.log10(np.where(values > 0, values, np.nan))
    some = np.isfinite(values)
    rows, columns = np.flatnonzero(some.any(1)), np.flatnonzero(some.any(0))
    if not len(rows):
        return None
    rows = rows[:: -(-len(rows) // steps)]
    return found.steps[rows], [found.layers[i] for i in columns], values[np.ix_(rows, columns)]
