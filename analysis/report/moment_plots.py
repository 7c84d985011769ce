"""Plots of the moments' spectra: over training, over depth, and layer by layer."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import plotly.graph_objects as go

from analysis.comparison.sets import Arm, ComparisonSet
from analysis.pages.figures import Plot, figure, line
from analysis.report.plots import legend, legend_note
from analysis.runs.curves import Floats
from analysis.runs.reading import number

STATS = (("median", np.nanmedian, 2.2), ("largest", np.nanmax, 0.9))
MAX_STEPS, MIN_STEPS = 120, 12
MAX_CELLS = 150_000
"""Most cells of all heat maps together: they make most of the page's size."""


@dataclass(frozen=True)
class MomentFigure:
    """Presentation of one of `harness.protocols.MOMENT_FIGURES`."""

    title: str
    axis: str
    logarithmic: bool
    caption: str


FIGURES = {
    "condition_number": MomentFigure(
        "Condition number of the moment",
        "condition number",
        True,
        "σ1 over the smallest singular value above the rank cut.",
    ),
    "effective_rank": MomentFigure(
        "Effective rank of the moment", "effective rank", False, "Singular values above the rank cut."
    ),
    "stable_rank": MomentFigure("Stable rank of the moment", "stable rank", False, "‖M‖²_F/σ1²."),
    "orthogonality_error": MomentFigure(
        "Orthogonality error of the applied factor",
        "orthogonality error",
        True,
        "‖OOᵀ − I‖_F/√k. A small value does not prove a correct factor: see the polar error.",
    ),
    "polar_error": MomentFigure(
        "Distance of the applied factor from the polar factor",
        "polar error",
        True,
        "‖O − polar(M)‖_F/√k against an exact factor.",
    ),
}


@dataclass(frozen=True)
class Spectra:
    """Figures of one arm, median over its runs: name → (steps, layers), NaN where none was recorded.

    Layers are sorted by block number, and within a block in the order of the record.
    """

    steps: Floats
    layers: list[str]
    values: dict[str, Floats]


ArmSpectra = Mapping[int, Spectra]
"""Index of the arm → its figures; without the arms that recorded none."""


def read_spectra(comparison: ComparisonSet) -> ArmSpectra:
    """Return the spectrum figures of all arms of a set."""
    by_arm = {index: _fold_runs(arm) for index, arm in enumerate(comparison.arms)}
    return {index: values for index, values in by_arm.items() if values is not None}


def over_steps(comparison: ComparisonSet, spectra: ArmSpectra) -> dict[str, Plot]:
    """Draw each recorded figure over steps."""
    plots = {}
    for name, shown in FIGURES.items():
        traces: list[Any] = []
        for index, values in _having(spectra, name):
            for stat, reduce, width in STATS:
                ys = fold(reduce, values.values[name], 1)
                kept = np.isfinite(ys)
                label = comparison.arms[index].label
                traces.append(_trace(index, label, stat, values.steps[kept], ys[kept], width, "at step"))
        if traces:
            built = _lines(comparison, traces, name, {"title": {"text": "optimizer steps"}})
            caption = f"{shown.caption} Thick: median over matrices; thin: the largest. Median over seeds."
            caption += legend_note(comparison)
            plots[name] = Plot(f"{name.replace('_', '-')}", shown.title, caption, built, 340)
    return plots


def over_depth(comparison: ComparisonSet, spectra: ArmSpectra) -> dict[str, Plot]:
    """Draw each figure over the blocks of the model, at each arm's last probe; empty for a single block."""
    plots = {}
    for name, shown in FIGURES.items():
        traces: list[Any] = []
        steps = set()
        for index, values in _having(spectra, name):
            profile = _profile(values, name)
            if profile is None:
                continue
            step, blocks, by_block = profile
            steps.add(f"{step:g}")
            for stat, reduce, width in STATS:
                ys = np.array([float(reduce(v)) for v in by_block])
                label = comparison.arms[index].label
                traces.append(_trace(index, label, stat, np.array(blocks, float), ys, width, "in block"))
        if traces:
            blocks = [round(x) for trace in traces for x in trace.x]
            xaxis = {"title": {"text": "block of the model"}, "dtick": 1 + (max(blocks) - min(blocks)) // 12}
            built = _lines(comparison, traces, name, {**xaxis, "tick0": min(blocks)})
            at = f"step {steps.pop()}" if len(steps) == 1 else "each optimizer's last probed step"
            caption = f"At {at}. Thick: median over the matrices of a block; thin: the largest."
            title = f"{shown.axis.capitalize()} over depth"
            plots[name] = Plot(f"{name.replace('_', '-')}-depth", title, caption, built, 340)
    return plots


def heat_map(comparison: ComparisonSet, spectra: ArmSpectra) -> Plot | None:
    """Draw each matrix over steps, one figure and one optimizer at a time; None if nothing was probed."""
    names = [name for name in FIGURES if any(True for _ in _having(spectra, name))]
    if not names:
        return None
    arms = list(spectra)
    room = MAX_CELLS // max(sum(len(spectra[i].layers) for i in arms) * len(names), 1)
    steps = min(MAX_STEPS, max(MIN_STEPS, room))
    traces = []
    for choice, name in enumerate(names):
        grids = {i: grid for i, values in _having(spectra, name) if (grid := _grid(values, name, steps))}
        if not grids:
            continue
        low = min(float(np.nanmin(z)) for _, _, z in grids.values())
        high = max(float(np.nanmax(z)) for _, _, z in grids.values())
        for index, grid in grids.items():
            traces.append(_heat(grid, name, (low, high), [choice, arms.index(index)]))
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
        "Optimizer": [comparison.arms[index].label for index in arms],
    }
    return Plot("heat", "Matrix by matrix", caption, built, 130 + min(max(16 * rows, 160), 720), choices)


def _having(spectra: ArmSpectra, name: str) -> list[tuple[int, Spectra]]:
    return [(index, values) for index, values in spectra.items() if name in values.values]


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


def _lines(comparison: ComparisonSet, traces: list[Any], name: str, xaxis: dict[str, Any]) -> dict[str, Any]:
    shown, scale = FIGURES[name], {"rangemode": "tozero"}
    if shown.logarithmic:
        values = np.concatenate([np.asarray(trace.y, float) for trace in traces])
        values = values[values > 0]
        wide = not len(values) or values.max() > 100 * values.min()
        scale = {"type": "log", "exponentformat": "power", "dtick": 1 if wide else "D2"}
    return figure(traces, xaxis=xaxis, yaxis={"title": {"text": shown.axis}, **scale}, **legend(comparison))


def _profile(spectra: Spectra, name: str) -> tuple[float, list[int], list[Floats]] | None:
    """Return the last step with any value, the blocks, and the values of each; None for fewer than two blocks."""
    values = spectra.values[name]
    last = int(np.flatnonzero(np.isfinite(values).any(1))[-1])
    by_block: dict[int, list[float]] = {}
    for layer, value in zip(spectra.layers, values[last], strict=True):
        number = block(layer)
        if number is not None and np.isfinite(value):
            by_block.setdefault(number, []).append(float(value))
    if len(by_block) < 2:
        return None
    blocks = sorted(by_block)
    return float(spectra.steps[last]), blocks, [np.array(by_block[b]) for b in blocks]


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


def _grid(spectra: Spectra, name: str, steps: int) -> tuple[Floats, list[str], Floats] | None:
    """Return steps, layers and values (log10 for a logarithmic axis), without empty rows and columns."""
    values = spectra.values[name]
    if FIGURES[name].logarithmic:
        values = np.log10(np.where(values > 0, values, np.nan))
    some = np.isfinite(values)
    rows, columns = np.flatnonzero(some.any(1)), np.flatnonzero(some.any(0))
    if not len(rows):
        return None
    rows = rows[:: -(-len(rows) // steps)]
    return spectra.steps[rows], [spectra.layers[i] for i in columns], values[np.ix_(rows, columns)]


def _fold_runs(arm: Arm) -> Spectra | None:
    """Return the median of the arm's figures over its runs; None if no run recorded any."""
    frames = [run.moments for run in arm.runs if len(run.moments)]
    if not frames:
        return None
    columns = [{name: frame[name].tolist() for name in frame.columns} for frame in frames]
    for c in columns:
        c["step"] = [number(step) for step in c["step"]]
    steps = np.unique(np.concatenate([np.asarray(c["step"], float) for c in columns]))
    steps = steps[np.isfinite(steps)]
    names = dict.fromkeys(str(layer) for c in columns for layer in c["layer"])
    layers = sorted(names, key=lambda layer: (block(layer) is None, block(layer) or 0))
    place = {layer: index for index, layer in enumerate(layers)}
    values = {}
    for name in FIGURES:
        cube = np.full((len(columns), len(steps), len(layers)), np.nan)
        for run, c in enumerate(columns):
            if name in c:
                at = np.asarray(c["step"], float)
                kept = np.flatnonzero(np.isfinite(at))
                rows = np.searchsorted(steps, at[kept])
                cube[run, rows, [place[str(c["layer"][i])] for i in kept]] = [
                    number(c[name][i]) for i in kept
                ]
        cube[~np.isfinite(cube)] = np.nan
        if np.isfinite(cube).any():
            values[name] = fold(np.nanmedian, cube, 0)
    return Spectra(steps, layers, values)


def fold(reduce: Callable[..., Floats], values: Floats, axis: int) -> Floats:
    """Apply ``reduce`` over an axis; NaN, without numpy's warning, where there are no values."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return reduce(values, axis=axis)


def block(layer: str) -> int | None:
    """Return the block number of a matrix: ``model.layers.3.mlp.up_proj.weight`` → 3; None without one."""
    match = re.search(r"\.(\d+)\.", layer)
    return int(match[1]) if match else None


def short(layer: str) -> str:
    """Shorten ``model.layers.3.self_attn.q_proj.weight`` to ``3 q_proj``; without a number drop only the ending."""
    stem = re.sub(r"\.weight$", "", layer)
    numbered = re.search(r"\.(\d+)\.(.*)$", stem)
    return f"{numbered[1]} {numbered[2].rsplit('.', 1)[-1]}" if numbered else stem
