"""What plots share, and training loss over seconds: plotly figures as plain dictionaries, coloured by the page.

A trace says whose it is in ``meta`` (``arm``: index of the arm, ``part``: index of a kind), and the page's
script gives it the colour of the theme in use. Lists for the other horizontal axes ride along in ``meta.x``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import plotly.graph_objects as go

from analysis.compare.comparison import ComparisonSet
from analysis.compare.curves import single_curve, thinned

# Okabe & Ito's colours for all kinds of colour vision (2008), darker or lighter where the ground asks for it;
# lines differ in their dashes too.
PALETTES = {
    "light": ["#0072b2", "#d55e00", "#009e73", "#b0568c", "#b37a00", "#3d9bd6", "#6b7280", "#7a4f2a"],
    "dark": ["#5cb3ec", "#ff8c4a", "#35c99c", "#eaa0cb", "#f2bd48", "#a5dbff", "#b6bcc6", "#d2a679"],
}
DASHES = ["solid", "dash", "dot", "dashdot", "longdash", "longdashdot"]
AXIS_TITLES = {"tokens": "training tokens", "steps": "optimizer steps", "seconds": "training time (s)"}
AXIS_TITLES["flops"] = "model FLOPs"
MAX_POINTS = 400
"""Points of a curve in a plot: more than the pixels that tell them apart on a wide screen at half width."""
ALL_POINTS = 12_000
"""Points of a plot with a line per run: more make a browser stutter."""
MAX_LEGEND = 12
"""Arms that a legend names; more of them would take the plot's place."""


@dataclass
class Plot:
    """One figure of the report."""

    key: str
    title: str
    caption: str
    figure: dict[str, Any]
    height: int = 340
    choices: dict[str, list[str]] = field(default_factory=dict)
    """What the reader chooses between, by name: the traces are shown whose ``meta.choice`` lists the chosen
    indices.
    """
    axes: list[str] = field(default_factory=list)
    """Horizontal axes that the reader may choose from."""


def figure(traces: list[Any], **layout: Any) -> dict[str, Any]:
    """A checked plotly figure as a dictionary (arrays as lists, NaN as null), without template colours."""
    described = go.Layout(template="none", **layout).to_plotly_json()
    return {"data": [plain(trace.to_plotly_json()) for trace in traces], "layout": plain(described)}


def plain(value: Any) -> Any:
    """JSON data: arrays as lists, numbers that are not finite as null."""
    if isinstance(value, dict):
        return {key: plain(entry) for key, entry in value.items()}
    if isinstance(value, np.ndarray | list | tuple):
        return [plain(entry) for entry in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def line(arm: int, width: float = 2.2) -> dict[str, Any]:
    """Colour and dash of an arm; the dash goes on changing after the colours are used up."""
    colours = PALETTES["light"]
    return {"color": colours[arm % len(colours)], "dash": DASHES[arm % len(DASHES)], "width": width}


def legend(chosen: ComparisonSet) -> dict[str, bool]:
    """Layout of a plot whose traces are arms."""
    return {"showlegend": len(chosen.arms) <= MAX_LEGEND}


def unnamed(chosen: ComparisonSet) -> str:
    """What a caption says in place of a legend."""
    few = len(chosen.arms) <= MAX_LEGEND
    return "" if few else " Colours and dashes as in the table; the pointer shows names."


def wall_clock(chosen: ComparisonSet) -> Plot | None:
    """Training loss of every run over training seconds."""
    traces, named = [], set()
    points = min(MAX_POINTS, max(60, ALL_POINTS // len(chosen.runs)))
    for index, arm in enumerate(chosen.arms):
        for run in arm.runs:
            curve = single_curve(run, "train/loss")
            if curve is None or "seconds" not in curve.x:
                continue
            keep = thinned(curve.mean, points)
            traces.append(
                go.Scatter(
                    x=curve.x["seconds"][keep],
                    y=curve.mean[keep],
                    mode="lines",
                    line=line(index, 1.2),
                    opacity=0.85,
                    name=arm.label,
                    legendgroup=arm.label,
                    showlegend=arm.label not in named,
                    hovertemplate=f"seed {run.seed}: %{{y:.4f}} at %{{x:.1f}} s<extra>{arm.label}</extra>",
                    meta={"arm": index},
                )
            )
            named.add(arm.label)
    if not traces:
        return None
    built = figure(
        traces,
        xaxis={"title": {"text": AXIS_TITLES["seconds"]}},
        yaxis={"title": {"text": "training loss (nats/token)"}},
        **legend(chosen),
    )
    caption = "One line per run. Time is that of training with its evaluations and probes, over all attempts."
    caption += unnamed(chosen)
    return Plot("wall-clock", "Training loss over wall-clock time", caption, built, 380)
