"""Figures of a memorization job: each measure over the validation loss and over epochs, and over the rank."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go

from analysis.memorization import equal_loss
from analysis.memorization.equal_loss import MemorizationMeasure, RunCurve
from analysis.pages.figures import Plot, figure, line

GRID = 25
Rows = Sequence[Mapping[str, Any]]


def all_plots(results: Rows, comparison: Rows) -> list[Plot]:
    """Return a plot per measure over the validation loss, the first measure over epochs, and the dose."""
    curves = equal_loss.run_curves(results)
    measures = equal_loss.measures(results)
    plots = [_over_loss(curves, measure) for measure in measures if not measure.is_chance]
    plots.append(_over_epochs(results, measures[0]))
    dose = _over_rank(results, comparison)
    return plots if dose is None else [*plots, dose]


def _over_loss(curves: Sequence[RunCurve], measure: MemorizationMeasure) -> Plot:
    traces: list[Any] = []
    for arm, name in enumerate(dict.fromkeys(curve.optimizer for curve in curves)):
        of_arm = [curve for curve in curves if curve.optimizer == name]
        for curve in of_arm:
            values = [measure.value(result) for result in curve.results]
            traces.append(_trace(arm, f"{name}, seed {curve.seed}", curve.losses, values, faint=True))
        reached = equal_loss.common_range(of_arm)
        if reached is not None:
            grid = np.linspace(*reached, GRID)
            mean = [float(np.mean([curve.at(loss, measure.value) for curve in of_arm])) for loss in grid]
            traces.append(_trace(arm, name, grid, mean))
    # Training goes from left to right: the loss falls.
    axes = {
        "xaxis": {"title": {"text": "validation loss (nats/token)"}, "autorange": "reversed"},
        "yaxis": {"title": {"text": measure.title}},
    }
    caption = "Training goes to the right. Thin: single seeds, a point per checkpoint; thick: their mean."
    return Plot(
        measure.key, f"{measure.title} at equal validation loss", caption, figure(traces, **axes), 360
    )


def _over_epochs(results: Rows, measure: MemorizationMeasure) -> Plot:
    traces: list[Any] = []
    for arm, name in enumerate(dict.fromkeys(r["optimizer"] for r in results)):
        of_arm = [r for r in results if r["optimizer"] == name]
        for seed in dict.fromkeys(r["seed"] for r in of_arm):
            of_run = sorted((r for r in of_arm if r["seed"] == seed), key=lambda r: r["step"])
            x, y = [r["epochs"] for r in of_run], [measure.value(r) for r in of_run]
            traces.append(_trace(arm, f"{name}, seed {seed}", x, y, faint=True))
        by_step: dict[float, list[float]] = {}
        for r in of_arm:
            by_step.setdefault(r["epochs"], []).append(measure.value(r))
        x = sorted(by_step)
        traces.append(_trace(arm, name, x, [float(np.mean(by_step[value])) for value in x]))
    axes = {"xaxis": {"title": {"text": "epochs"}}, "yaxis": {"title": {"text": measure.title}}}
    caption = "At equal steps; optimizers differ in validation loss here."
    return Plot("epochs", f"{measure.title} over epochs", caption, figure(traces, **axes), 340)


def _over_rank(results: Rows, comparison: Rows) -> Plot | None:
    ranks = {r["optimizer"]: r["rank"] for r in results if r["rank"] is not None}
    names = list(dict.fromkeys(r["optimizer"] for r in results))
    families: dict[str, list[str]] = {}
    for label in ranks:
        families.setdefault(label.partition(" (")[0], []).append(label)
    if not comparison or all(len(labels) < 2 for labels in families.values()):
        return None
    entry = comparison[0]
    means = {arm["optimizer"]: arm for arm in entry["optimizers"]}
    traces = []
    for family, labels in families.items():
        labels = sorted((l for l in labels if means[l]["mean"] is not None), key=lambda l: ranks[l])
        if len(labels) < 2:
            continue
        x, y = [ranks[label] for label in labels], [means[label]["mean"] for label in labels]
        trace = _trace(names.index(labels[0]), family, x, y)
        if all(means[label]["low"] is not None for label in labels):
            high = [means[label]["high"] - means[label]["mean"] for label in labels]
            trace.error_y = {"type": "data", "array": high}
        traces.append(trace)
    axes = {
        "xaxis": {
            "title": {"text": "rank of the subspace"},
            "type": "log",
            "tickvals": sorted(set(ranks.values())),
        },
        "yaxis": {"title": {"text": entry["title"]}},
    }
    caption = f"At validation loss {entry['val_loss']:.4f}, with 95 % intervals over seeds."
    return Plot("rank", f"{entry['title']} over rank", caption, figure(traces, **axes), 320)


def _trace(arm: int, name: str, x: Sequence[float] | Any, y: Sequence[float], *, faint: bool = False) -> Any:
    points = [(float(a), float(b)) for a, b in zip(x, y) if math.isfinite(a + b)]
    return go.Scatter(
        x=[a for a, _ in points],
        y=[b for _, b in points],
        mode="lines+markers" if faint or len(points) < GRID else "lines",
        name=name,
        line=line(arm, 0.8 if faint else 2.4),
        marker={"size": 4 if faint else 6},
        opacity=0.45 if faint else 1.0,
        showlegend=not faint,
        hovertemplate=f"{name}: %{{y:.4g}}<extra></extra>",
        meta={"arm": arm},
    )
