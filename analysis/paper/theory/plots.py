"""Plots of `optbench paper sumo_theory`, as plain dictionaries that the page colours (`analysis.pages.figures`)."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import plotly.graph_objects as go

from analysis.pages.figures import GREY, Plot, colour, figure, line
from analysis.paper.theory.findings import LINE_LABEL, Theory
from analysis.paper.theory.paired_runs import PairedRow
from analysis.paper.theory.polar_bound import ITERATIONS, MUON, SIDE, STEPS, bound, geometric
from analysis.paper.theory.run_moments import LINE, error_of


def all_plots(theory: Theory) -> list[Plot]:
    """Return the plots that the results have numbers for."""
    plots = [_rank(theory), _bounds()]
    if theory.conditions:
        plots += [_conditions(theory), _shares(theory)]
    if theory.spectra:
        plots.append(_spectra(theory))
    if theory.errors:
        plots.append(_errors(theory))
    if theory.paired:
        plots.append(_paired(theory))
    return plots


def _curve(arm: int, name: str, x: Iterable[float], y: Iterable[float], mode: str = "lines") -> Any:
    return go.Scatter(
        x=list(x),
        y=list(y),
        mode=mode,
        name=name,
        line=line(arm),
        hovertemplate=f"{name}: %{{y:.4g}}<extra></extra>",
        meta={"arm": arm},
    )


def _grey(name: str, x: Iterable[float], y: Iterable[float]) -> Any:
    style = {"color": GREY, "dash": "dot", "width": 1.6}
    return go.Scatter(x=list(x), y=list(y), mode="lines", name=name, line=style, hoverinfo="skip")


def _axes(x: str, y: str, *, x_log: bool = False, y_log: bool = False) -> dict[str, Any]:
    def axis(title: str, is_log: bool) -> dict[str, Any]:
        return {"title": {"text": title}} | ({"type": "log", "dtick": 1} if is_log else {})

    return {"xaxis": axis(x, x_log), "yaxis": axis(y, y_log)}


def _rank(theory: Theory) -> Plot:
    traces = []
    for arm, row in enumerate(theory.ranks):
        sign = ">" if row.holds else "≤"
        name = f"{row.layer}, ηλ₁ = {row.smallest:.2g}, β = {row.beta:g} (1 − ηλ₁ {sign} β)"
        traces.append(_curve(arm, name, [t for t, _ in row.curve], [share for _, share in row.curve]))
    caption = (
        "Simulated gradient descent on a reversible layer, fp64. Where 1 − ηλ₁ ≤ β the moment keeps its shape, "
        "whatever the lemma says."
    )
    built = figure(traces, **_axes("step", "1 − σ₁²/‖M‖²_F", y_log=True))
    return Plot(
        "rank", "Lemma 3.1: what the best rank-one part of the moment leaves out", caption, built, 420
    )


def _bounds() -> Plot:
    kappas = np.geomspace(1.001, 1e5, 160)
    traces = [_grey("the lemma's bound", kappas, bound(kappas, STEPS))]
    for arm, iteration in enumerate(ITERATIONS):
        errors = [float(iteration.direction_errors(geometric(float(k)), STEPS).max()) for k in kappas]
        traces.append(_curve(arm, iteration.label, kappas, errors))
    caption = f"Largest error of a direction after five steps, {SIDE} singular values in equal ratios, fp64."
    built = figure(traces, **_axes("κ(A)", "‖E‖₂", x_log=True))
    return Plot("bound", "Lemma 3.2: bound and error", caption, built, 420)


def _series(theory: Theory) -> list[tuple[str, list[Any]]]:
    """Return the name of each arm, and its rows of `theory.conditions`."""
    return [
        (arm.label, [row for row in theory.conditions if row.arm == arm])
        for arm in dict.fromkeys(row.arm for row in theory.conditions)
    ]


def _conditions(theory: Theory) -> Plot:
    traces = []
    for arm, (name, rows) in enumerate(_series(theory)):
        steps = [row.step for row in rows]
        traces.append(_curve(arm, f"{name}, median", steps, [row.condition["median"] for row in rows]))
        for quantile in ("q25", "q75"):
            thin = go.Scatter(
                x=steps,
                y=[row.condition[quantile] for row in rows],
                mode="lines",
                name=f"{name}, {quantile}",
                line={**line(arm), "width": 0.8},
                showlegend=False,
                hoverinfo="skip",
                meta={"arm": arm},
            )
            traces.append(thin)
    ends = [min(row.step for row in theory.conditions), max(row.step for row in theory.conditions)]
    traces.append(_grey(LINE_LABEL, ends, [LINE, LINE]))
    caption = (
        "Median and quartiles over the hidden matrices of all seeds, at the probed steps (moments.parquet)."
    )
    built = figure(traces, **_axes("step", "condition number of the first moment", y_log=True))
    return Plot("condition", "Figure 1(a): condition number of the first moments", caption, built, 400)


def _shares(theory: Theory) -> Plot:
    traces = [
        _curve(arm, name, [row.step for row in rows], [row.residual_share for row in rows])
        for arm, (name, rows) in enumerate(_series(theory))
    ]
    caption = "1 − 1/(stable rank), median over matrices: what Lemma 3.1 says tends to 0, on real moments."
    built = figure(traces, **_axes("step", "1 − σ₁²/‖M‖²_F"))
    return Plot("share", "Lemma 3.1 on real moments", caption, built, 320)


def _spectra(theory: Theory) -> Plot:
    traces = [
        _curve(arm, name, range(1, len(values) + 1), values)
        for arm, (name, values) in enumerate(theory.spectra.items())
    ]
    caption = "Median over the hidden matrices with the commonest rank; from checkpoints."
    built = figure(traces, **_axes("i", "σ_i/σ₁", y_log=True))
    return Plot("spectra", "Figure 1(b): singular values of the first moments", caption, built, 360)


def _errors(theory: Theory) -> Plot:
    traces = []
    for arm, place in enumerate(dict.fromkeys(row.arm for row in theory.errors)):
        rows = [row for row in theory.errors if row.arm == place]
        rows = rows[:: max(1, len(rows) // 300)]
        traces.append(
            go.Scatter(
                x=[row.condition for row in rows],
                y=[row.measured for row in rows],
                mode="markers",
                name=place.label,
                marker={"color": colour(arm), "size": 4},
                meta={"arm": arm},
            )
        )
    kappas = np.geomspace(1.0, max(10.0, max(row.condition for row in theory.errors)), 80)
    for side in sorted({row.side for row in theory.errors})[-2:]:
        curve = [error_of(geometric(float(kappa), side)) for kappa in kappas]
        traces.append(_grey(f"geometric spectrum, rank {side}", kappas, curve))
    caption = (
        f"Each point is a moment of a checkpoint. A direction inside the band errs by at most "
        f"{theory.band.largest_error:.2f}, whatever κ is."
    )
    built = figure(traces, **_axes("κ of the moment", "‖O_NS − UVᵀ‖_F/√k", x_log=True))
    return Plot("error", f"The error of {MUON.label}, five steps, on real moments", caption, built, 400)


def _rates(row: PairedRow) -> tuple[float, float]:
    return row.exact_lr, row.newton_schulz_lr


def _paired(theory: Theory) -> Plot:
    traces = []
    for arm, place in enumerate(dict.fromkeys((row.arm, *_rates(row)) for row in theory.paired)):
        rows = [row for row in theory.paired if (row.arm, *_rates(row)) == place]
        steps = [row.step for row in rows]
        name = f"lr {place[2]:g} against {place[0].label}, {rows[0].difference.n} seeds"
        traces.append(_curve(arm, name, steps, [row.difference.mean for row in rows], "lines+markers"))
        if all(math.isfinite(row.difference.half_width) for row in rows):
            low = [row.difference.mean - row.difference.half_width for row in rows]
            high = [row.difference.mean + row.difference.half_width for row in rows]
            traces.append(
                go.Scatter(
                    x=[*steps, *reversed(steps)],
                    y=[*low, *reversed(high)],
                    fill="toself",
                    fillcolor=colour(arm),
                    opacity=0.15,
                    mode="lines",
                    line={"width": 0},
                    showlegend=False,
                    hoverinfo="skip",
                )
            )
    ends = [min(row.step for row in theory.paired), max(row.step for row in theory.paired)]
    traces.append(_grey("equal", ends, [0.0, 0.0]))
    caption = "Newton–Schulz minus exact, same seed and batches; mean and 95 % interval over seeds."
    built = figure(traces, **_axes("step", "difference of validation loss, nats"))
    return Plot("paired", "Figure 2: five Newton–Schulz steps against the exact factor", caption, built, 360)
