"""From the states of a toy net to its rows, status, predicted constant and rate."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from analysis.margin import chosen as choice
from analysis.margin import rates, trajectory
from analysis.margin.chosen import Chosen
from analysis.margin.closed_form import Separated, separated
from analysis.margin.net import Nets, Problem
from analysis.margin.steps import is_dead
from analysis.margin.trajectory import Run

HIT_TOLERANCE = 1e-3
CONSTANT_OF_GD = ("gd", "ngd", "adamw")
"""|b₂ - b₁| tends to the C of gradient descent; for Adam because ε ends its invariance to scale."""
CONSTANT_AT_START = ("sign", "spectral", "muon")
"""|b₂ - b₁| stays what it is."""


def judged(
    out: Run,
    problem: Problem,
    optimizer: Chosen,
    states: Sequence[tuple[float | None, float, Nets]],
    stop: float,
) -> Run:
    """Fill in rows, status, prediction and rate."""
    points = problem.points
    last = states[-1][2]
    is_finite = all(bool(np.isfinite(part).all()) for _, _, net in states for part in net)
    if not is_finite:
        out.status = "diverged"
        states = [s for s in states if all(bool(np.isfinite(part).all()) for part in s[2])]
    elif bool(is_dead(last, problem)[0]):
        out.status = "dead"
    state = _first_separated(states, problem)
    out.facts |= {
        "margin_opt": points.margin_optimum,
        "margin_inf": state.margin_limit if state and optimizer.kind in CONSTANT_OF_GD else None,
        "separated_at": next((t for t, log_tau, _ in states if state and log_tau == state.log_tau), None),
    }
    found = None
    for t, log_tau, net in states:
        row, found = trajectory.measured(net, problem, t, log_tau)
        out.rows.append(row)
    if out.status != "ok":
        return out
    out.status = "flat" if found is not None and found.flat else "ok"
    out.predicted = _predicted(optimizer, state, out.rows)
    limit = out.facts["margin_inf"] if out.facts["margin_inf"] is not None else points.margin_optimum
    x = np.array([row["ln_tau"] for row in out.rows])
    gaps = np.abs(limit - np.array([row["margin"] for row in out.rows]))
    out.rate = rates.classify(x, gaps, _settled(state, out.rows), stop)
    if not math.isclose(limit, points.margin_optimum, abs_tol=1e-9):
        out.facts["note"] = (
            "the margin tends to margin_inf, not to the optimum; the rate is that of margin_inf - margin"
        )
    return _with_events(out)


def _first_separated(
    states: Sequence[tuple[float | None, float, Nets]], problem: Problem
) -> Separated | None:
    return next((found for _, log_tau, net in states if (found := separated(net, problem, log_tau))), None)


def _settled(state: Separated | None, rows: Sequence[trajectory.Row]) -> float:
    """ln τ from which the start is forgotten; without a closed form from the first row that is right everywhere."""
    if state is not None:
        return state.settled
    right = next((row for row in rows if row["f_min"] > 0.0), None)
    if right is None:
        return math.inf
    biggest = max(abs(value) for key, value in right.items() if key[0] == "f" and key[1:].isdigit())
    return max(math.log(100.0) + biggest, right["ln_tau"])


def _predicted(optimizer: Chosen, state: Separated | None, rows: Sequence[trajectory.Row]) -> float | None:
    kind = optimizer.kind
    if state is None or optimizer.weight_decay:
        return None
    if kind in CONSTANT_OF_GD:
        return state.constant if kind == "gd" or _is_standard(state) else None
    # Newton–Schulz leaves the two rows of unequal length.
    is_exact = optimizer.options.get("orthogonalizer", "auto") in choice.EXACT
    if kind in CONSTANT_AT_START and is_exact and _is_standard(state) and "delta_b" in rows[0]:
        return float(next(row["delta_b"] for row in rows if row["ln_tau"] >= state.log_tau))
    return None


def _is_standard(state: Separated) -> bool:
    return math.isclose(state.a, 1.0) and math.isclose(state.c, 1.0) and state.log_rate == (0.0, 0.0)


def _with_events(out: Run) -> Run:
    """First step at which both outputs agree to 1e-3 (what convergence looks like), and the largest gap."""
    rows = out.rows
    hit = next(
        (
            r
            for r in rows
            if "f2" in r and "f3" not in r and abs(r["f1"] + r["f2"]) < HIT_TOLERANCE and r["t"]
        ),
        None,
    )
    right = [row for row in rows if row["f_min"] > 0.0] or rows
    peak = max(right, key=lambda row: row["gap"])
    out.facts |= {
        "t_hit": hit["t"] if hit else None,
        "gap_peak": peak["gap"],
        "gap_peak_ln_tau": _plain(peak["ln_tau"]),
        "gap_last": rows[-1]["gap"],
        "margin_last": rows[-1]["margin"],
    }
    return out


def _plain(x: float) -> float | None:
    return x if math.isfinite(x) else None
