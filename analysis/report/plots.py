"""What plots of a comparison share, and the plot of training loss."""

from __future__ import annotations

from collections.abc import Sequence

import plotly.graph_objects as go

from analysis import formatting
from analysis.compare.comparison import ComparisonSet
from analysis.formatting import to_jsonable
from analysis.pages.figures import MAX_POINTS, Plot, figure, line
from analysis.runs.curves import AXES, Curve, single_curve, thinned

AXIS_TITLES = {"tokens": "training tokens", "steps": "optimizer steps", "seconds": "training time (s)"}
AXIS_TITLES["flops"] = "model FLOPs"
AXIS_WORDS = {"flops": "FLOPs"}
ALL_POINTS = 12_000
"""Points of a plot with a line per run: more make a browser stutter."""
MAX_LEGEND = 12
"""Arms that a legend names; more of them would take the plot's place."""


def legend(chosen: ComparisonSet) -> dict[str, bool]:
    """Layout of a plot whose traces are arms."""
    return {"showlegend": len(chosen.arms) <= MAX_LEGEND}


def unnamed(chosen: ComparisonSet) -> str:
    """What a caption says in place of a legend."""
    few = len(chosen.arms) <= MAX_LEGEND
    return "" if few else " Colours and dashes as in the table; the pointer shows names."


def training_loss(chosen: ComparisonSet) -> Plot | None:
    """Training loss of every run over tokens, steps, seconds or FLOPs; None if no run logged it."""
    points = min(MAX_POINTS, max(60, ALL_POINTS // len(chosen.runs)))
    curves = [
        (index, arm, run, curve)
        for index, arm in enumerate(chosen.arms)
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
        yaxis={"title": {"text": "training loss (nats/token)"}},
        meta={"titles": {axis: AXIS_TITLES[axis] for axis in axes}},
        **legend(chosen),
    )
    caption = "One line per run."
    if "seconds" in axes:
        caption += " Seconds are those of training with its evaluations and probes, over all attempts."
    caption += absent_axes([(arm.label, curve) for _, arm, _, curve in curves], axes) + unnamed(chosen)
    return Plot("training-loss", "Training loss", caption, built, 380, axes=axes)


def absent_axes(curves: Sequence[tuple[str, Curve]], axes: Sequence[str]) -> str:
    """Why an axis can't be chosen: which arms lack it."""
    text = ""
    for axis in AXES:
        lacking = list(dict.fromkeys(label for label, curve in curves if axis not in curve.x))
        if axis not in axes and any(axis in curve.x for _, curve in curves):
            verb = "record" if len(lacking) > 1 else "records"
            text += f" Not over {AXIS_WORDS.get(axis, axis)}: {formatting.listing(lacking[:6])} {verb} none."
    return text
