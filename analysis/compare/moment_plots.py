"""Figures of the moments' spectra over training, layers and optimizers."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import plotly.graph_objects as go

from analysis.compare.comparison import Arm, ComparisonSet
from analysis.compare.curves import Floats
from analysis.compare.plots import Plot, figure, line
from analysis.compare.reading import number

TITLES = {
    "condition_number": ("Condition number of the moment", "condition number", True),
    "effective_rank": ("Effective rank of the moment", "effective rank", False),
    "stable_rank": ("Stable rank of the moment", "stable rank", False),
    "orthogonality_error": ("Orthogonality error of the applied factor", "orthogonality error", True),
    "polar_error": ("Distance of the applied factor from the polar factor", "polar error", True),
}
"""Figure of `harness.record.schema.MOMENT_FIGURES` → title, axis title, logarithmic axis."""
CAPTIONS = {
    "condition_number": "σ1 over the smallest singular value above the rank cut. Thick: median over layers; "
    "thin: largest layer. Median over seeds.",
    "effective_rank": "Singular values above the rank cut. Thick: median over layers; thin: largest layer.",
    "stable_rank": "‖M‖²_F/σ1². Thick: median over layers; thin: largest layer.",
    "orthogonality_error": "‖OOᵀ − I‖_F/√k. Small does not mean right: see the polar error.",
    "polar_error": "‖O − polar(M)‖_F/√k against an exact factor.",
}
MAX_STEPS = 120


@dataclass(frozen=True)
class Spectra:
    """One arm's figures, median over its runs: name → (steps, layers), NaN where none was recorded."""

    steps: Floats
    layers: list[str]
    values: dict[str, Floats]


def moment_plots(chosen: ComparisonSet) -> list[Plot]:
    """Every spectrum figure over steps that some arm recorded."""
    found = [spectra(arm) for arm in chosen.arms]
    plots = [_over_steps(chosen, found, name) for name in TITLES]
    return [plot for plot in plots if plot is not None]


def heat_map(chosen: ComparisonSet) -> Plot | None:
    """log10 condition number, layer × step, one optimizer at a time; None where nothing was probed."""
    grids = {arm.label: grid for arm in chosen.arms if (grid := _grid(spectra(arm))) is not None}
    if not grids:
        return None
    low = min(float(np.nanmin(values)) for _, _, values in grids.values())
    high = max(float(np.nanmax(values)) for _, _, values in grids.values())
    traces = [
        go.Heatmap(
            z=np.round(values.T, 3),
            x=[f"{step:g}" for step in steps],
            y=[short(layer) for layer in layers],
            zmin=low,
            zmax=high,
            colorscale="Cividis",
            colorbar={"title": {"text": "log10 κ", "side": "right"}, "thickness": 12},
            visible=index == 0,
            hovertemplate="%{y}, step %{x}: log10 κ = %{z}<extra></extra>",
            meta={"choice": index},
        )
        for index, (steps, layers, values) in enumerate(grids.values())
    ]
    built = figure(
        traces,
        xaxis={"title": {"text": "optimizer steps"}, "type": "category"},
        yaxis={"autorange": "reversed", "type": "category"},
        meta={"heat": True},
    )
    caption = (
        "One row per matrix, first layer on top; one colour scale for all optimizers. Median over seeds."
    )
    rows = max(len(layers) for _, layers, _ in grids.values())
    height = 130 + min(max(16 * rows, 160), 720)
    return Plot("heat", "Condition number by layer and step", caption, built, height, list(grids))


def short(layer: str) -> str:
    """``model.layers.3.self_attn.q_proj.weight`` → ``3 q_proj``; a name without a number loses its ending
    only.
    """
    stem = re.sub(r"\.weight$", "", layer)
    numbered = re.search(r"\.(\d+)\.(.*)$", stem)
    return f"{numbered[1]} {numbered[2].rsplit('.', 1)[-1]}" if numbered else stem


def spectra(arm: Arm) -> Spectra | None:
    """The arm's figures folded over its runs; None if no run recorded any. Layers keep the model's order."""
    frames = [run.moments for run in arm.runs if len(run.moments)]
    if not frames:
        return None
    columns = [{name: frame[name].tolist() for name in frame.columns} for frame in frames]
    steps = np.unique(np.concatenate([np.asarray(c["step"], float) for c in columns]))
    layers = list(dict.fromkeys(str(layer) for c in columns for layer in c["layer"]))
    place = {layer: index for index, layer in enumerate(layers)}
    values = {}
    for name in TITLES:
        cube = np.full((len(columns), len(steps), len(layers)), np.nan)
        for run, c in enumerate(columns):
            if name in c:
                row = np.searchsorted(steps, np.asarray(c["step"], float))
                cube[run, row, [place[str(layer)] for layer in c["layer"]]] = [number(v) for v in c[name]]
        cube[~np.isfinite(cube)] = np.nan
        if np.isfinite(cube).any():
            values[name] = _fold(np.nanmedian, cube, 0)
    return Spectra(steps, layers, values)


def _fold(reduce: Callable[..., Floats], values: Floats, axis: int) -> Floats:
    """``reduce`` over an axis; NaN, without numpy's warning, where there is nothing to reduce."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return reduce(values, axis=axis)


def _over_steps(chosen: ComparisonSet, found: Sequence[Spectra | None], name: str) -> Plot | None:
    traces: list[Any] = []
    for index, spectrum in enumerate(found):
        if spectrum is None or name not in spectrum.values:
            continue
        label = chosen.arms[index].label
        for stat, reduce, width in (("median", np.nanmedian, 2.2), ("largest", np.nanmax, 0.9)):
            values = _fold(reduce, spectrum.values[name], 1)
            kept = np.isfinite(values)
            traces.append(
                go.Scatter(
                    x=spectrum.steps[kept],
                    y=values[kept],
                    name=label,
                    legendgroup=label,
                    showlegend=stat == "median",
                    mode="lines+markers" if kept.sum() < 30 and stat == "median" else "lines",
                    marker={"size": 4},
                    line=line(index, width),
                    hovertemplate=f"{stat}: %{{y:.3~g}} at step %{{x}}<extra>{label}</extra>",
                    meta={"arm": index},
                )
            )
    if not traces:
        return None
    title, axis, logarithmic = TITLES[name]
    yaxis: dict[str, Any] = {"title": {"text": axis}}
    if logarithmic:
        yaxis |= {"type": "log", "exponentformat": "power", "dtick": 1}
    else:
        yaxis |= {"rangemode": "tozero"}
    built = figure(traces, xaxis={"title": {"text": "optimizer steps"}}, yaxis=yaxis)
    return Plot(name.replace("_", "-"), title, CAPTIONS[name], built, 340)


def _grid(found: Spectra | None) -> tuple[Floats, list[str], Floats] | None:
    """Steps, layers and log10 condition numbers (steps, layers), empty rows and columns left out."""
    if found is None or "condition_number" not in found.values:
        return None
    kappa = found.values["condition_number"]
    logs = np.log10(np.where(kappa > 0, kappa, np.nan))
    some = np.isfinite(logs)
    rows, columns = np.flatnonzero(some.any(1)), np.flatnonzero(some.any(0))
    if not len(rows):
        return None
    rows = rows[:: -(-len(rows) // MAX_STEPS)]
    return found.steps[rows], [found.layers[i] for i in columns], logs[np.ix_(rows, columns)]
