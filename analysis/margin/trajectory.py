"""Rows of a trajectory: what is measured of a toy net at one time."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from analysis.margin.boundary import Margin, margin
from analysis.margin.net import Nets, Problem, log_loss, outputs, preactivations
from analysis.margin.rates import Rate

Row = dict[str, Any]


@dataclass
class Run:
    """One net under one optimizer, from start to end.

    Attributes:
        optimizer: as named by the user.
        run: number among the random starts.
        status: "ok"; "dead" (a point stays on the wrong side); "flat" (separated, but f ≡ 0 on a zone between the
            points); "diverged".
        rows: of the trajectory, ascending in t.
        predicted: C, the limit of |b₂ - b₁|, where theory has one; for gradient descent also the inverse slope
            of 1/gap against ln t.
        rate: what the trajectory says.
        facts: further figures of the run (`summary.json`).
    """

    optimizer: str
    run: int
    status: str
    rows: list[Row] = field(default_factory=list)
    predicted: float | None = None
    rate: Rate = field(default_factory=lambda: Rate("undetermined", why="no trajectory"))
    facts: dict[str, Any] = field(default_factory=dict)


def measured(net: Nets, problem: Problem, t: float | None, log_tau: float) -> tuple[Row, Margin]:
    """The row of one net (R = 1).

    `t` steps, `ln_tau`; `margin` (exact), `gap` to the optimum, `x_star` (signed place of the nearest boundary),
    `log_loss`, `f_min` (smallest y·f), outputs `f1…`, `pattern` (for each point which neurons are on), norms of
    weights under which the smallest output is a normalized margin, `delta_b` = |b₂ - b₁| for two neurons, and the
    weights.
    """
    points = problem.points
    found = margin(net, points)
    values = outputs(net, points)[:, 0].astype(np.float64)
    smallest = float((points.y * values).min())
    on = preactivations(net, points)[..., 0] > 0.0
    row: Row = {
        "t": t,
        "ln_tau": log_tau,
        "margin": found.value,
        "gap": points.margin_optimum - found.value,
        "x_star": found.boundary,
        "log_loss": float(log_loss(net, problem)[0]),
        "f_min": smallest,
        "pattern": "|".join("".join("01"[int(flag)] for flag in column) for column in on.T),
    }
    row |= {f"f{i + 1}": float(value) for i, value in enumerate(values)}
    row |= {f"norm_margin_{name}": smallest / size for name, size in _norms(net, problem).items()}
    hidden = net.hidden[..., 0].astype(np.float64)
    if len(hidden) == 2:
        row["delta_b"] = abs(float(hidden[1, -1] - hidden[0, -1]))
    return {**row, **_weights(net, problem)}, found


def _norms(net: Nets, problem: Problem) -> Mapping[str, float]:
    """‖θ‖ in three geometries; the product over both layers where v is trained, since f then scales with it."""
    hidden = net.hidden[..., 0].astype(np.float64)
    sizes = {
        "l2": float(np.linalg.norm(hidden)),
        "linf": float(np.abs(hidden).max()),
        "spec": float(np.linalg.norm(hidden, 2)),
    }
    if problem.train_output:
        v = net.output[:, 0].astype(np.float64)
        size = {"l2": np.linalg.norm(v), "linf": np.abs(v).max(), "spec": np.linalg.norm(v)}
        sizes = {name: value * float(size[name]) for name, value in sizes.items()}
    return {name: value if value > 0.0 else math.nan for name, value in sizes.items()}


def _weights(net: Nets, problem: Problem) -> Row:
    """w1, b1, v1, w2, …; w1_1, w1_2 … in more than one dimension."""
    row: Row = {}
    dim = problem.points.x.shape[1]
    for j, (neuron, v) in enumerate(zip(net.hidden[..., 0].tolist(), net.output[:, 0].tolist()), 1):
        if dim == 1:
            row[f"w{j}"] = neuron[0]
        else:
            row |= {f"w{j}_{i}": value for i, value in enumerate(neuron[:-1], 1)}
        row |= {f"b{j}": neuron[-1], f"v{j}": v}
    return row
