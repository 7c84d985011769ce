"""Mode `disks`: does a wide net on two balls of points in R^d behave as two neurons on two points?

Each run draws its own points, n in each of two balls of R^d, and its own weights. The balls' nearest points are -e₁ and
e₁. The wide net has k neurons, w ~ N(0, 2/d), b = 0, and output weights of 1 and -1 that stay (the presumed setting of
arXiv 2603.02095; its text was not available). Its partner has two neurons on two points of the line that are as far
apart as the nearest two points of different balls, drawn from the same law until one neuron is on each side, as 1 of 4
is.

No margin is known exactly for more than two neurons: an attack bounds it from above and CROWN from below, over all
points. Margins are shares of the largest that any classifier can have, half the distance of the nearest two points.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
import torch
from numpy.typing import NDArray
from torch import nn

from analysis.comparison.statistics import interval
from analysis.formatting import listing
from analysis.margin.config import MarginConfig
from analysis.margin.input_margins import attack, certified_radius
from analysis.margin.net import Nets, ToyProblem, log_loss, outputs
from analysis.margin.optimizer_specs import OptimizerSpec
from analysis.margin.outputs import MarginReport
from analysis.margin.plots import step_axes
from analysis.margin.points import Points, pair
from analysis.margin.steps import record_times, train
from analysis.margin.toy import LR, log_time, optimizers_of
from analysis.margin.trajectory import MarginRun, TrajectoryRow
from analysis.margin.trajectory import measure as measure_toy
from analysis.pages.figures import Plot, colour, figure, line
from harness.errors import InputError

STEPS, PER_DECADE = 10_000, 1
PARTNER = "two neurons"
QUESTION = "Does a wide net on two balls of points behave as two neurons on two points do?"
Floats = NDArray[np.float64]
Say = Callable[[str], None]


def balls(n: int, dim: int, radius: float, rng: np.random.Generator) -> Points:
    """Return n points uniform in each of two balls of R^dim, labels -1 and 1; -e₁ and e₁ are the balls' nearest."""
    direction = rng.normal(size=(2 * n, dim))
    direction /= np.linalg.norm(direction, axis=1, keepdims=True)
    x = direction * radius * rng.uniform(size=(2 * n, 1)) ** (1.0 / dim)
    y = np.r_[-np.ones(n), np.ones(n)]
    x[:, 0] += y * (1.0 + radius)
    return Points(x, y, "two balls")


def run_disks(config: MarginConfig, say: Say) -> list[MarginRun]:
    """Train a wide net and its partner for each optimizer and run.

    Returns:
        per optimizer and run the wide net, then its partner (named `OPTIMIZER, two neurons`).

    Raises:
        InputError: bad input; fewer than two neurons.
    """
    if config.k < 2:
        raise InputError(
            "k", config.k, "is one neuron, which never changes its sign", allowed="2 or more", fix="k=50"
        )
    if config.dtype != "float64":
        raise InputError("dtype", config.dtype, "rounds certified radii", allowed="float64 with mode=disks")
    runs: list[MarginRun] = []
    for spec in optimizers_of(config, LR):
        for number in range(config.runs):
            rng = np.random.default_rng([config.seed, number])
            points = balls(config.points, config.dim, config.radius, rng)
            runs += [_wide(config, spec, points, rng, number), _partner(config, spec, points, rng, number)]
        last = [_last(run, "share") for run in runs if run.optimizer == spec.name]
        say(f"{spec.name}: {config.runs} runs, {np.mean(last):.3f} of the largest margin by the attack")
    return runs


def _wide(
    config: MarginConfig, spec: OptimizerSpec, points: Points, rng: np.random.Generator, number: int
) -> MarginRun:
    k, dim = config.k, config.dim
    hidden = np.zeros((k, dim + 1, 1))
    hidden[:, :-1, 0] = rng.normal(0.0, (2.0 / dim) ** 0.5, (k, dim))
    v = np.where(np.arange(k) < (k + 1) // 2, 1.0, -1.0)[:, None]
    return _trained(
        config, spec, ToyProblem(points, config.loss, config.reduction), Nets(hidden, v), number, spec.name
    )


def _partner(
    config: MarginConfig, spec: OptimizerSpec, points: Points, rng: np.random.Generator, number: int
) -> MarginRun:
    apart = points.margin_optimum
    w = rng.normal(0.0, 2.0**0.5, 2)
    while not w[0] > 0.0 > w[1]:
        w = rng.normal(0.0, 2.0**0.5, 2)
    start = Nets(np.stack([w, np.zeros(2)], axis=1)[..., None], np.array([[1.0], [-1.0]]))
    problem = ToyProblem(pair(apart, apart), config.loss, config.reduction)
    return _trained(config, spec, problem, start, number, f"{spec.name}, {PARTNER}")


def _trained(
    config: MarginConfig, spec: OptimizerSpec, problem: ToyProblem, start: Nets, number: int, name: str
) -> MarginRun:
    at = record_times(config.steps or STEPS, config.record or PER_DECADE)
    result = train(start, problem, spec, at, gives_up=False)
    run = MarginRun(name, number, "ok")
    for snapshot in result.snapshots[1:]:
        net = snapshot.nets
        if not all(np.isfinite(part).all() for part in net):
            run.status = "diverged"
            break
        row: TrajectoryRow = {"t": float(snapshot.t), "ln_tau": log_time(snapshot.t, spec, problem)}
        is_partner = name != spec.name
        lower, upper = _exact(net, problem) if is_partner else bracket(net, problem.points, config.seed)
        best = problem.points.margin_optimum
        row |= {"margin": upper, "gap": best - upper, "share": upper / best, "share_lower": lower / best}
        row["log_loss"] = float(log_loss(net, problem)[0])
        run.rows.append(row)
    run.facts = {"lr": spec.lr, "margin_opt": problem.points.margin_optimum, "steps": at[-1]}
    if run.status == "ok" and run.rows[-1]["margin"] <= 0.0:
        run.status = "not_separated"
    return run


def _exact(net: Nets, problem: ToyProblem) -> tuple[float, float]:
    margin = float(measure_toy(net, problem, None, 0.0)[0]["margin"])
    return margin, margin


def bracket(net: Nets, points: Points, seed: int) -> tuple[float, float]:
    """Return bounds (certified, attacked) of the ℓ2 margin of one net (R = 1); 0 if a point is on a wrong side."""
    if (points.y * outputs(net, points)[:, 0]).min() <= 0.0:
        return 0.0, 0.0
    model = sequential(net)
    x = torch.tensor(points.x)
    labels = torch.tensor((points.y > 0.0).astype(np.int64))
    upper = attack(model, x, labels, "l2", seed=seed)
    lower = certified_radius(model, x, labels, "l2", "crown", upper)
    return float(lower.min()), float(upper.min())


def sequential(net: Nets) -> nn.Sequential:
    """Return the net with two outputs -f/2 and f/2, whose difference is f: what attack and certificate take."""
    hidden, v = net.hidden[..., 0], net.output[:, 0]
    first = nn.Linear(hidden.shape[1] - 1, len(v), dtype=torch.float64)
    last = nn.Linear(len(v), 2, bias=False, dtype=torch.float64)
    with torch.no_grad():
        first.weight.copy_(torch.from_numpy(hidden[:, :-1].copy()))
        first.bias.copy_(torch.from_numpy(hidden[:, -1].copy()))
        last.weight.copy_(0.5 * torch.from_numpy(np.stack([-v, v])))
    return nn.Sequential(first, nn.ReLU(), last)


def report(config: MarginConfig, runs: Sequence[MarginRun]) -> MarginReport:
    """Return the report of mode `disks`."""
    table: list[dict[str, Any]] = []
    differences: list[dict[str, Any]] = []
    parts = []
    for name in config.optimizer:
        wide, partner = (
            [run for run in runs if run.optimizer == label] for label in (name, f"{name}, {PARTNER}")
        )
        steps = max(([row["t"] for row in run.rows] for run in wide), key=len, default=[])
        for place, at in enumerate(steps):
            row: dict[str, Any] = {"optimizer": name, "step": at}
            row |= _spread("wide net, attack", wide, place, "share")
            row |= _spread("wide net, certified", wide, place, "share_lower")
            row |= _spread(PARTNER, partner, place, "share")
            row["wide nets that separate"] = _separate(wide, place)
            row[f"{PARTNER} that separate"] = _separate(partner, place)
            row |= _spread("ln loss, wide", wide, place, "log_loss")
            row |= _spread(f"ln loss, {PARTNER}", partner, place, "log_loss")
            table.append(row)
        if not steps:
            continue
        last = table[-1]
        parts.append(
            f"{name}: {last['wide net, certified']:.0%} to {last['wide net, attack']:.0%}, "
            f"{PARTNER} {last[PARTNER]:.0%} ({last['wide nets that separate']} and "
            f"{last[f'{PARTNER} that separate']} of {len(wide)} separate)"
        )
        differences.append({"optimizer": name, **_paired(wide, partner)})
    headline = (
        f"Share of the largest margin after {config.steps or STEPS:,} steps, wide net between certificate and attack: "
        f"{listing(parts)}."
        if parts
        else "Every wide net diverged."
    )
    scope = (
        f"{config.runs} runs, each with its own points ({config.points} in each of two balls of radius "
        f"{config.radius:g} in R^{config.dim}) and weights ({config.k} neurons); mean ± standard deviation over runs. "
        "Two neurons: exact, on two points as far apart as the nearest of the balls. The share of the wide net lies "
        "between the certificate and the attack. No theorem covers the wide net: all of this was observed."
    )
    failed = sum(run.status != "ok" for run in runs)
    notes = (
        [f"{failed} of {len(runs)} nets do not separate their points; their share counts as 0"]
        if failed
        else []
    )
    return MarginReport(
        runs, notes, headline, scope, table, [_plot(config, table)] if table else [],
        {"wide_net_less_two_neurons_at_the_end": differences} if differences else {}, question=QUESTION,
    )  # fmt: skip


def _last(run: MarginRun, key: str) -> float:
    """Return a share at the end; 0 if the net does not separate its points or has diverged."""
    return max(0.0, run.rows[-1][key]) if run.status == "ok" else 0.0


def _spread(label: str, runs: Sequence[MarginRun], place: int, key: str) -> dict[str, float | None]:
    """Return mean and standard deviation over runs; a net that does not separate, or has diverged, has a share of 0.

    A loss is over the nets that have not diverged.
    """
    values = [run.rows[place][key] for run in runs if place < len(run.rows)]
    if key != "log_loss":
        values = [max(0.0, value) for value in values] + [0.0] * (len(runs) - len(values))
    sd = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return {label: float(np.mean(values)) if values else None, f"{label} sd": sd}


def _separate(runs: Sequence[MarginRun], place: int) -> int:
    return sum(place < len(run.rows) and run.rows[place]["margin"] > 0.0 for run in runs)


def _paired(wide: Sequence[MarginRun], partner: Sequence[MarginRun]) -> dict[str, float | None]:
    """Return the mean difference of shares over all runs and its 95 % t-interval, by certificate and by attack."""
    others = {run.run: run for run in partner}
    row: dict[str, float | None] = {}
    for label, key in (("by the certificate", "share_lower"), ("by the attack", "share")):
        found = interval([_last(run, key) - _last(others[run.run], "share") for run in wide])
        low, high = (
            (found.mean - found.half_width, found.mean + found.half_width) if found.n > 1 else (None, None)
        )
        row |= {label: found.mean, f"{label} low": low, f"{label} high": high}
    return row


def _plot(config: MarginConfig, table: Sequence[dict[str, Any]]) -> Plot:
    traces: list[Any] = []
    for arm, name in enumerate(config.optimizer):
        rows = [row for row in table if row["optimizer"] == name]
        if not rows:
            continue
        x = [row["step"] for row in rows]
        low, high = ([row[f"wide net, {side}"] for row in rows] for side in ("certified", "attack"))
        traces.append(
            go.Scatter(
                x=[*x, *x[::-1]], y=[*high, *low[::-1]], fill="toself", mode="none", opacity=0.2,
                fillcolor=colour(arm), hoverinfo="skip", showlegend=False, meta={"arm": arm, "band": True},
            )
        )  # fmt: skip
        for label, dash in (("wide net, attack", "solid"), (PARTNER, "dot")):
            sd = [row[f"{label} sd"] or 0.0 for row in rows]
            traces.append(
                go.Scatter(
                    x=x, y=[row[label] for row in rows], error_y={"array": sd, "thickness": 1, "width": 3},
                    mode="lines+markers", name=f"{name}: {label}", line={**line(arm), "dash": dash},
                    meta={"arm": arm}, hovertemplate=f"{name}, {label}: %{{y:.4f}}<extra></extra>",
                )
            )  # fmt: skip
    built = figure(traces, **step_axes(traces, "share of the largest margin"))
    caption = (
        "Means over runs; bars are standard deviations. Bands reach from the attack down to the certificate: "
        "the margin of the wide net is between."
    )
    return Plot("disks", "Margin of a wide net and of two neurons", caption, built, 380)
