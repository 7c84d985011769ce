"""Figures of a reconstruction job, as plain dictionaries that the report's page colours (`analysis.pages.figures`)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

import plotly.graph_objects as go

from analysis.pages.figures import GREY, Plot, colour, figure, line
from analysis.reconstruction.subjects import TableRow

STEPS = {"title": {"text": "training steps"}, "type": "log"}


def all_plots(tables: Mapping[str, Sequence[TableRow]], matches: Sequence[TableRow]) -> list[Plot]:
    """Return every plot that the rows allow, in the order of the page."""
    names = list(dict.fromkeys(row["optimizer"] for row in tables["certificate"]))
    certificate, attack = tables["certificate"], tables["attack"]
    plots: list[Plot | None] = []
    if len({row["step"] for row in certificate}) > 1:
        plots += [
            _residuals(certificate, names),
            _freedom(certificate, names),
            _quality_over_steps(attack, names),
        ]
    plots += [_over_radius(attack, names), _fit_over_radius(attack, names)]
    plots += [_ssim(matches, names), _susceptibility(tables["susceptibility"], names)]
    return [plot for plot in plots if plot is not None]


def _residuals(rows: Sequence[TableRow], names: Sequence[str]) -> Plot:
    traces = []
    for arm, name in enumerate(names):
        for key, label, width in (("residual", "fixed gates", 2.2), ("residual_clarke", "Clarke gates", 1.0)):
            traces += _curve(arm, f"{name}, {label}", _means(rows, name, "step", key), width)
    return Plot(
        "residuals",
        "Distance from a KKT point over training",
        "ε = ‖θ − Σ λᵢyᵢ∇Φ(xᵢ)‖/‖θ‖ with the best λ ≥ 0, mean over seeds. Thick: the network's own gates; thin: free "
        "multipliers where an image lies on a kink. The first stays high for ever and is no measure of convergence.",
        figure(traces, xaxis=STEPS, yaxis={"title": {"text": "relative residual"}, "type": "log"}),
    )


def _freedom(rows: Sequence[TableRow], names: Sequence[str]) -> Plot:
    traces = []
    for arm, name in enumerate(names):
        traces += _curve(arm, name, _means(rows, name, "step", "split_radius"))
    return Plot(
        "freedom",
        "How far images can move without the weights telling",
        "Median over images of the largest step along a direction orthogonal to all images that changes no gate of the "
        "network as it is, where the least margin is 1. It grows with training as ‖W₁‖ over its initial size.",
        figure(traces, xaxis=STEPS, yaxis={"title": {"text": "split radius"}, "type": "log"}),
    )


def _quality_over_steps(rows: Sequence[TableRow], names: Sequence[str]) -> Plot | None:
    attacks = [row for row in rows if row["kind"] == "attack"]
    if not attacks:
        return None
    radius = min(row["radius"] for row in attacks)
    attacks_at_radius = [row for row in attacks if row["radius"] == radius]
    traces = []
    for arm, (name, objective) in enumerate(_pairs(attacks_at_radius, names)):
        mine = [row for row in attacks_at_radius if row["objective"] == objective]
        traces += _curve(arm, f"{name}, {objective}", _means(mine, name, "step", "nn_top5_margin"))
    traces += _chance(rows, names, len(traces), "nn_top5_margin")
    return Plot(
        "quality",
        "Reconstruction over training",
        f"Mean distance of the five best-matched training images to the nearest candidate on the margin, initial "
        f"radius {radius:g}, mean over seeds. The grey line is what as many held-out images get; lower is nearer.",
        figure(traces, xaxis=STEPS, yaxis={"title": {"text": "NN distance, top 5"}}),
    )


def _over_radius(rows: Sequence[TableRow], names: Sequence[str]) -> Plot | None:
    last = _last(rows)
    if len({row["radius"] for row in last}) < 2:
        return None
    traces = []
    for arm, (name, objective) in enumerate(_pairs(last, names)):
        mine = [row for row in last if row["objective"] == objective]
        traces += _curve(arm, f"{name}, {objective}", _means(mine, name, "radius", "ncc_top5"))
    chance = [row["ncc_top5"] for row in rows if row["kind"] == "heldout"]
    if chance:
        xs = sorted({row["radius"] for row in last})
        traces.append(_grey(xs, [fmean(chance)] * len(xs)))
    return Plot(
        "radius",
        "Recovery against what the attacker believes",
        "Mean correlation of the five best-matched training images, last checkpoints, against the norm at which "
        "candidates start (1: that of public images). Grey: held-out images.",
        figure(
            traces,
            xaxis={"title": {"text": "initial radius of candidates"}, "type": "log"},
            yaxis={"title": {"text": "NCC, top 5"}},
        ),
    )


def _fit_over_radius(rows: Sequence[TableRow], names: Sequence[str]) -> Plot | None:
    last = [row for row in _last(rows) if row["objective"] == "l2"]
    if len({row["radius"] for row in last}) < 2:
        return None
    traces = []
    for arm, name in enumerate(names):
        traces += _curve(arm, name, _means(last, name, "radius", "residual"))
        traces += _curve(
            arm, f"{name}: the training set itself", _means(last, name, "radius", "residual_true"), 1.0
        )
    return Plot(
        "fit",
        "Fit against what the attacker believes",
        "K = ‖θ − u‖²/‖θ‖² of the published attack at the end (thick) and of the true training images with the best λ "
        "(thin), last checkpoints. A set that is far from the truth and below the thin line explains the weights "
        "better than the truth does.",
        figure(
            traces,
            xaxis={"title": {"text": "initial radius of candidates"}, "type": "log"},
            yaxis={"title": {"text": "K"}, "type": "log"},
        ),
    )


def _ssim(matches: Sequence[TableRow], names: Sequence[str]) -> Plot | None:
    shown = [row for row in matches if row["is_buddy"]]
    if not shown:
        return None
    traces = []
    for arm, name in enumerate(names):
        mine = [row for row in shown if row["optimizer"] == name]
        traces.append(
            go.Scatter(
                x=[row["margin"] for row in mine],
                y=[row["ssim"] for row in mine],
                mode="markers",
                marker={"color": colour(arm), "size": 7, "opacity": 0.75},
                name=name,
                meta={"arm": arm},
            )
        )
    return Plot(
        "ssim",
        "Which images are reconstructed",
        "SSIM of each training image's best buddy (after the published vote and stretch) against the image's margin "
        "over the least one; last checkpoints, smallest radius. Above 0.4 counts as good.",
        figure(
            traces,
            xaxis={"title": {"text": "yΦ(x) over the least margin"}},
            yaxis={"title": {"text": "SSIM"}},
        ),
    )


def _susceptibility(rows: Sequence[TableRow], names: Sequence[str]) -> Plot | None:
    if not rows:
        return None
    radius = min(row["radius"] for row in rows)
    latest = {name: max((r["step"] for r in rows if r["optimizer"] == name), default=0) for name in names}
    last_rows = [r for r in rows if r["radius"] == radius and r["step"] == latest.get(r["optimizer"])]
    traces = []
    for part, objective in enumerate(dict.fromkeys(r["objective"] for r in last_rows)):
        mine = [r for r in last_rows if r["objective"] == objective]
        halves = [r["half_width_nn_top5_margin"] for r in mine]
        traces.append(
            go.Bar(
                x=[r["optimizer"] for r in mine],
                y=[r["advantage_nn_top5_margin"] for r in mine],
                error_y={
                    "color": "#6b7280",
                    "array": [h or 0 for h in halves],
                    "visible": any(h is not None for h in halves),
                },
                name=f"{objective} objective",
                marker={"color": colour(part)},
                meta={"part": part + 1},
            )
        )
    return Plot(
        "susceptibility",
        "Susceptibility by optimizer",
        f"How much nearer than held-out images the attack comes (0: not at all, 1: exactly), candidates on the margin, "
        f"initial radius {radius:g}, last checkpoints; bars: 95 % intervals over victims' seeds if there are several.",
        figure(
            traces,
            xaxis={"title": {"text": "optimizer"}},
            yaxis={"title": {"text": "advantage"}},
            barmode="group",
        ),
    )


def _means(rows: Iterable[TableRow], name: str, x: str, y: str) -> dict[float, float]:
    values_by_x: dict[float, list[float]] = defaultdict(list)
    for row in rows:
        if row["optimizer"] == name and row.get(x) is not None and row.get(y) is not None:
            values_by_x[row[x]].append(row[y])
    return {key: fmean(values) for key, values in sorted(values_by_x.items())}


def _curve(arm: int, name: str, points: Mapping[float, float], width: float = 2.2) -> list[Any]:
    if not points:
        return []
    return [
        go.Scatter(
            x=list(points),
            y=list(points.values()),
            mode="lines+markers",
            line=line(arm, width),
            name=name,
            meta={"arm": arm},
        )
    ]


def _chance(rows: Sequence[TableRow], names: Sequence[str], used: int, key: str) -> list[Any]:
    heldout = [row for row in rows if row["kind"] == "heldout"]
    steps = sorted({row["step"] for row in heldout})
    values = [fmean(row[key] for row in heldout if row["step"] == step) for step in steps]
    return [_grey(steps, values)] if steps and used else []


def _grey(x: Sequence[float], y: Sequence[float]) -> Any:
    return go.Scatter(
        x=list(x),
        y=list(y),
        mode="lines",
        line={"color": GREY, "width": 1.6, "dash": "dot"},
        name="held out",
    )


def _last(rows: Sequence[TableRow]) -> list[TableRow]:
    attacks = [row for row in rows if row["kind"] == "attack"]
    latest: dict[str, int] = {}
    for row in attacks:
        latest[row["optimizer"]] = max(row["step"], latest.get(row["optimizer"], 0))
    return [row for row in attacks if row["step"] == latest[row["optimizer"]]]


def _pairs(rows: Sequence[TableRow], names: Sequence[str]) -> list[tuple[str, str]]:
    return [
        p
        for name in names
        for p in dict.fromkeys((name, r["objective"]) for r in rows if r["optimizer"] == name)
    ]
