"""Figures of a reconstruction job, as plain dictionaries that the report's page colours (`analysis.pages.figures`)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

import plotly.graph_objects as go

from analysis.pages.figures import DASHES, GREY, Plot, colour, decades, figure, line
from analysis.reconstruction.page_tables import ALTERNATIVE_KINDS, ATTACKS
from analysis.reconstruction.subjects import FIXTURE, TableRow
from analysis.reconstruction.susceptibility import chance_level, interval

STEPS = "training steps"
INITIAL_RADIUS = "initial radius of candidates"
UNIT_ROUNDOFF = 2.0**-53


def all_plots(tables: Mapping[str, Sequence[TableRow]], matches: Sequence[TableRow]) -> list[Plot]:
    """Return every plot that the rows allow, in the order of the page.

    Of several offsets that attackers believe in the plots show the first; the tables compare them.
    """
    certificate, attack = tables["certificate"], _of_first_offset(tables["attack"])
    names = list(dict.fromkeys(row["optimizer"] for row in tables["alternatives"] or certificate or attack))
    names += [name for name in dict.fromkeys(row["optimizer"] for row in attack) if name not in names]
    plots: list[Plot | None] = [*_theorem(tables["alternatives"])]
    if len({row["step"] for row in certificate or attack}) > 1:
        plots.append(_quality_over_steps(attack, names))
    plots += [_susceptibility(_of_first_offset(tables["susceptibility"]), names), _over_radius(attack, names)]
    plots += [_fit_over_radius(attack, names), _ssim(matches, names)]
    if len({row["step"] for row in certificate}) > 1:
        plots += [_residuals(certificate, names), _freedom(certificate, names)]
    return [plot for plot in plots if plot is not None]


def _theorem(rows: Sequence[TableRow]) -> list[Plot]:
    """Return residual and margin over the radius of a split, on an exact network; empty without one."""
    exact = [row for row in rows if row["optimizer"] == FIXTURE and row["radius"] is not None]
    radii = sorted({row["radius"] for row in exact if row["kind"] == "null_split"})
    if len(radii) < 2:
        return []
    plots = []
    for key, title, y, caption, value in (
        (
            "residual",
            "Do other training sets explain the weights?",
            "relative residual",
            "‖θ − Σ λᵢyᵢ∇Φ(zᵢ)‖/‖θ‖ of sets in which every image was split and moved by the radius, recomputed. Exact "
            "splits stay at rounding, which grows with the radius; random directions (control) explain nothing.",
            lambda row: row["residual"],
        ),
        (
            "margin",
            "Do other training sets keep the least margin of 1?",
            "|least margin − 1|",
            "Distance of the least margin from 1, the condition that the training images fulfil. Exact splits keep it "
            "to rounding at any radius; random directions (control) lose it from the first step.",
            lambda row: abs(row["margin_min"] - 1),
        ),
    ):
        traces = []
        for part, kind in enumerate(("null_split", "in_span_split", "random_split")):
            own = sorted((row for row in exact if row["kind"] == kind), key=lambda row: row["radius"])
            # A difference of exactly 0 has no place on a logarithmic axis: the unit roundoff stands for it.
            points = {row["radius"]: max(value(row), UNIT_ROUNDOFF) for row in own if row["radius"] in radii}
            traces.append(_trace(part, ALTERNATIVE_KINDS[kind], points))
        shown = [trace for trace in traces if trace is not None]
        values = [v for trace in shown for v in trace.y]
        plots.append(
            Plot(
                f"theorem-{key}",
                title,
                caption,
                figure(
                    shown,
                    xaxis=decades("radius of the split", radii[0], radii[-1]),
                    yaxis=decades(y, min(values), max(values)),
                ),
            )
        )
    return plots


def _residuals(rows: Sequence[TableRow], names: Sequence[str]) -> Plot:
    fixed = _curves(rows, names, "step", "residual", "{}, fixed gates")
    free = _curves(rows, names, "step", "residual_clarke", "{}, Clarke gates", width=1.0)
    return Plot(
        "residuals",
        "Distance from a KKT point over training",
        "ε = ‖θ − Σ λᵢyᵢ∇Φ(xᵢ)‖/‖θ‖ with the best λ ≥ 0, mean over seeds. Thick: the network's own gates; thin: free "
        "multipliers where an image is on a kink. The first does not converge to 0 and is not a measure of "
        "convergence.",
        figure(
            _by_arm(fixed, free), xaxis=_axis(STEPS, log=True), yaxis=_axis("relative residual", log=True)
        ),
    )


def _freedom(rows: Sequence[TableRow], names: Sequence[str]) -> Plot:
    traces = _curves(rows, names, "step", "split_radius")
    return Plot(
        "freedom",
        "Distance that images can move without a change of the weights",
        "Median over images of the largest step along a direction orthogonal to all images that changes no gate of the "
        "unmodified network, where the least margin is 1. It grows with training as ‖W₁‖ over its initial size.",
        figure(traces, xaxis=_axis(STEPS, log=True), yaxis=_axis("split radius", log=True)),
    )


def _quality_over_steps(rows: Sequence[TableRow], names: Sequence[str]) -> Plot | None:
    attacks = [row for row in rows if row["kind"] == "attack"]
    if not attacks:
        return None
    radius = min(row["radius"] for row in attacks)
    at_radius = [row for row in attacks if row["radius"] == radius]
    traces = _variant_curves(at_radius, names, "step", "nn_top5_margin")
    heldout = [row for row in rows if row["kind"] == "heldout"]
    steps = sorted({row["step"] for row in heldout})
    if steps and traces:
        chance = [_chance_at([row for row in heldout if row["step"] == step]) for step in steps]
        traces.append(_chance(steps, chance))
    return Plot(
        "quality",
        "Reconstruction over training",
        f"Distance of the five best-matched training images to the nearest candidate on the margin, initial radius "
        f"{radius:g}, mean over sets of images; lower is nearer. Bars: 95 % over sets; differences within sets are in "
        f"the table. Grey: held-out images.",
        figure(
            traces,
            xaxis=decades(STEPS, min(r["step"] for r in attacks), max(r["step"] for r in attacks)),
            yaxis=_axis("distance, five best"),
        ),
    )


def _chance_at(heldout: Sequence[TableRow]) -> float:
    return fmean(chance_level("nn_top5_margin", row) for row in heldout)


def _over_radius(rows: Sequence[TableRow], names: Sequence[str]) -> Plot | None:
    last = _last(rows)
    radii = sorted({row["radius"] for row in last})
    if len(radii) < 2:
        return None
    traces = _variant_curves(last, names, "radius", "ncc_top5")
    if chance := [row["ncc_top5"] for row in rows if row["kind"] == "heldout"]:
        traces.append(_chance(radii, [fmean(chance)] * len(radii)))
    return Plot(
        "radius",
        "Recovery against what the attacker believes",
        "Mean correlation of the five best-matched training images, last checkpoints, against the norm at which "
        "candidates start (1: that of public images). Grey: held-out images.",
        figure(traces, xaxis=_radii(rows), yaxis=_axis("NCC, top 5")),
    )


def _fit_over_radius(rows: Sequence[TableRow], names: Sequence[str]) -> Plot | None:
    last = [row for row in _last(rows) if row["objective"] == "l2"]
    if len({row["radius"] for row in last}) < 2:
        return None
    fit = _curves(last, names, "radius", "residual")
    truth = _curves(last, names, "radius", "residual_true", "{}: the training set itself", width=1.0)
    return Plot(
        "fit",
        "Fit against what the attacker believes",
        "K = ‖θ − u‖²/‖θ‖² of the published attack at the end (thick) and of the true training images with the best λ "
        "(thin), last checkpoints. A set that is far from the truth and below the thin line explains the weights "
        "better than the truth does.",
        figure(_by_arm(fit, truth), xaxis=_radii(last), yaxis=_axis("K", log=True)),
    )


def _ssim(matches: Sequence[TableRow], names: Sequence[str]) -> Plot | None:
    shown = [row for row in matches if row["is_buddy"] and row["ssim"] is not None]
    if not shown:
        return None
    traces = []
    for arm, name in enumerate(names):
        rows = [row for row in shown if row["optimizer"] == name]
        traces.append(
            go.Scatter(
                x=[row["margin"] for row in rows],
                y=[row["ssim"] for row in rows],
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
            xaxis=_axis("yΦ(x) over the least margin"),
            yaxis=_axis("SSIM"),
        ),
    )


def _susceptibility(rows: Sequence[TableRow], names: Sequence[str]) -> Plot | None:
    if not rows:
        return None
    radius = min(row["radius"] for row in rows)
    latest = {name: max((r["step"] for r in rows if r["optimizer"] == name), default=0) for name in names}
    last_rows = [r for r in rows if r["radius"] == radius and r["step"] == latest.get(r["optimizer"])]
    traces = []
    for part, variant in enumerate(dict.fromkeys(_variant(row) for row in last_rows)):
        own_rows = [r for r in last_rows if _variant(r) == variant]
        halves = [r["half_width_nn_top5_margin"] for r in own_rows]
        traces.append(
            go.Bar(
                x=[r["optimizer"] for r in own_rows],
                y=[r["advantage_nn_top5_margin"] for r in own_rows],
                error_y={
                    "color": "#6b7280",
                    "array": [h or 0 for h in halves],
                    "visible": any(h is not None for h in halves),
                },
                name=variant,
                marker={"color": colour(part)},
                meta={"part": part + 1},
            )
        )
    return Plot(
        "susceptibility",
        "Susceptibility by optimizer",
        f"How much closer the attack comes than held-out images (0: no closer, 1: exact), candidates on the margin, "
        f"initial radius {radius:g}, last checkpoints; bars: 95 % intervals over sets of images if there are several.",
        figure(
            traces,
            xaxis=_axis("optimizer"),
            yaxis=_axis("advantage"),
            barmode="group",
        ),
    )


def _radii(rows: Sequence[TableRow]) -> dict[str, Any]:
    radii = [row["radius"] for row in rows if row.get("radius") is not None]
    return decades(INITIAL_RADIUS, min(radii), max(radii))


def _variant(row: TableRow) -> str:
    """Return the name of an attack's objective and scale of the weights."""
    return f"{ATTACKS[row['objective']]}, {row['weights']} weights"


def _axis(title: str, *, log: bool = False) -> dict[str, Any]:
    return {"title": {"text": title}, **({"type": "log"} if log else {})}


def _curves(
    rows: Iterable[TableRow],
    names: Sequence[str],
    x: str,
    y: str,
    label: str = "{}",
    width: float = 2.2,
) -> list[Any]:
    """Return a trace per optimizer that has values of y, their mean over rows of equal x."""
    rows = list(rows)
    traces = [
        _trace(arm, label.format(name), _means(rows, x, y, optimizer=name), width)
        for arm, name in enumerate(names)
    ]
    return [trace for trace in traces if trace is not None]


def _variant_curves(rows: Sequence[TableRow], names: Sequence[str], x: str, y: str) -> list[Any]:
    """Return a trace per optimizer and kind of attack: the colour is the optimizer's, the dash the attack's."""
    variants = list(dict.fromkeys(_variant(row) for row in rows))
    traces = []
    for arm, name in enumerate(names):
        for dash, variant in enumerate(variants):
            own = [row for row in rows if row["optimizer"] == name and _variant(row) == variant]
            trace = _trace(arm, f"{name}, {variant}", _means(own, x, y), dash=DASHES[dash % len(DASHES)])
            if trace is None:
                continue
            halves = _half_widths(own, x, y)
            if any(half is not None for half in halves):
                trace.error_y = {"array": [half or 0.0 for half in halves], "thickness": 1, "width": 3}
            traces.append(trace)
    return traces


def _half_widths(rows: Sequence[TableRow], x: str, y: str) -> list[float | None]:
    """Return the 95 % half width over sets of images at each value of x, ascending."""
    sets: dict[float, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        sets[row[x]][row["data_set"]].append(row[y])
    return [interval([fmean(v) for v in by_set.values()])[1] for _, by_set in sorted(sets.items())]


def _by_arm(*groups: Sequence[Any]) -> list[Any]:
    """Return the traces of all groups, those of one optimizer next to each other."""
    return sorted((trace for group in groups for trace in group), key=lambda trace: trace.meta["arm"])


def _means(rows: Iterable[TableRow], x: str, y: str, **equal: str) -> dict[float, float]:
    values: dict[float, list[float]] = defaultdict(list)
    for row in rows:
        is_member = all(row[key] == value for key, value in equal.items())
        if is_member and row.get(x) is not None and row.get(y) is not None:
            values[row[x]].append(row[y])
    return {key: fmean(group) for key, group in sorted(values.items())}


def _trace(
    arm: int, name: str, points: Mapping[float, float], width: float = 2.2, dash: str | None = None
) -> Any | None:
    if not points:
        return None
    style = line(arm, width) | ({} if dash is None else {"dash": dash})
    return go.Scatter(
        x=list(points),
        y=list(points.values()),
        mode="lines+markers",
        line=style,
        name=name,
        meta={"arm": arm},
    )


def _chance(x: Sequence[float], y: Sequence[float]) -> Any:
    """Return the grey line of what held-out images get."""
    style = {"color": GREY, "width": 1.6, "dash": "dot"}
    return go.Scatter(x=list(x), y=list(y), mode="lines", line=style, name="held out")


def _of_first_offset(rows: Sequence[TableRow]) -> list[TableRow]:
    """Return the attacks with the first believed offset, and the baselines, which have none."""
    first = next((row["offset"] for row in rows if row.get("offset") is not None), None)
    return [row for row in rows if row.get("offset") in (None, first)]


def _last(rows: Sequence[TableRow]) -> list[TableRow]:
    """Return the attacks on the last checkpoint of each optimizer."""
    attacks = [row for row in rows if row["kind"] == "attack"]
    latest: dict[str, int] = {}
    for row in attacks:
        latest[row["optimizer"]] = max(row["step"], latest.get(row["optimizer"], 0))
    return [row for row in attacks if row["step"] == latest[row["optimizer"]]]
