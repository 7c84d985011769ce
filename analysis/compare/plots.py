"""What plots of a comparison share, and training loss over seconds."""

from __future__ import annotations

import plotly.graph_objects as go

from analysis.compare.comparison import ComparisonSet
from analysis.compare.curves import single_curve, thinned
from analysis.page.figures import MAX_POINTS, Plot, figure, line

AXIS_TITLES = {"tokens": "training tokens", "steps": "optimizer steps", "seconds": "training time (s)"}
AXIS_TITLES["flops"] = "model FLOPs"
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
