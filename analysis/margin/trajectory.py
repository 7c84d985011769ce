"""What is measured of a toy net over time, how fast its gap closes, and the class of rate that this supports."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from analysis.margin.flow import SeparatedState, separated_state
from analysis.margin.net import (
    ExactMargin,
    Nets,
    ToyProblem,
    exact_margin,
    is_dead,
    log_loss,
    outputs,
    preactivations,
)
from analysis.margin.optimizer_specs import OptimizerSpec
from analysis.margin.rules import EXACT_FACTORS

Floats = NDArray[np.float64]
TrajectoryRow = dict[str, Any]
ZERO = 1e-12
"""A gap below this is 0."""
GOOD = 0.999
"""Least r² of a fit that decides a class."""
DECADES = 2.0
"""Length of ln t, in decades, that a law 1/ln t must be straight over."""
LEAST_DECADES = 1.0
"""Length below which no constant is fitted."""
CURVED = 0.02
"""Relative difference of the slopes of both halves from which 1/gap counts as curved."""
POWER = (0.8, 1.2)
"""Exponents that count as a power of t."""
DECADE = float(np.log(10.0))
HIT_TOLERANCE = 1e-3
"""Outputs of the two points that agree to this look converged."""
CONSTANT_OF_GD = ("gd", "ngd", "adamw")
"""Rules under which |b₂ - b₁| tends to the C of gradient descent; for Adam because ε ends its invariance to scale."""
CONSTANT_AT_START = ("sign", "spectral", "muon")
"""Rules under which |b₂ - b₁| stays what it is."""


@dataclass(frozen=True)
class Rate:
    """Rate at which a trajectory closes its gap.

    Attributes:
        rate_class: "log" (1/gap is affine in ln t), "power" (gap ~ 1/t), "zero", or "undetermined".
        constant: C, the inverse slope of 1/gap against ln t; None where the class is another or the window
            is shorter than a decade.
        slope: of 1/gap against ln t.
        r2: of that fit.
        window: (first, last) ln t of the fit.
        exponent: gap ~ t^(-exponent), fitted to the last decade.
        exponent_r2: of that fit.
        log_exponent: gap ~ (ln t)^(-log_exponent), fitted in the window; where ln t > 1.
        why: reason that kept the class from being decided, or "".
    """

    rate_class: str
    constant: float | None = None
    slope: float | None = None
    r2: float | None = None
    window: tuple[float, float] | None = None
    exponent: float | None = None
    exponent_r2: float | None = None
    log_exponent: float | None = None
    why: str = ""


class ToyState(NamedTuple):
    """One net at a time.

    Attributes:
        t: steps; None where their number exceeds fp64.
        log_tau: ln of the flow time, -inf at the start.
        net: its weights (R = 1).
    """

    t: float | None
    log_tau: float
    net: Nets


@dataclass
class MarginRun:
    """One net under one optimizer, from its start to the last step.

    Attributes:
        optimizer: name that the user gave.
        run: number among the random starts.
        status: "ok"; "dead" (a point stays on the wrong side); "flat" (separated, but f ≡ 0 on a zone between the
            points); "diverged".
        rows: of the trajectory, ascending in t.
        predicted: C, the limit of |b₂ - b₁|, where theory has one; for gradient descent also the inverse slope
            of 1/gap against ln t.
        rate: class and constants of the trajectory.
        facts: further figures of the run, for `summary.json`.
    """

    optimizer: str
    run: int
    status: str
    rows: list[TrajectoryRow] = field(default_factory=list)
    predicted: float | None = None
    rate: Rate = field(default_factory=lambda: Rate("undetermined", why="no trajectory"))
    facts: dict[str, Any] = field(default_factory=dict)


def measure(
    net: Nets, problem: ToyProblem, t: float | None, log_tau: float
) -> tuple[TrajectoryRow, ExactMargin]:
    """Return the row of one net (R = 1), and its exact margin.

    `t` steps, `ln_tau`; `margin` (exact), `gap` to the optimum, `x_star` (signed place of the nearest boundary),
    `log_loss`, `f_min` (smallest y·f), outputs `f1…`, `pattern` (for each point which neurons are on), norms of
    weights under which the smallest output is a normalized margin, `delta_b` = |b₂ - b₁| for two neurons, and the
    weights.
    """
    points = problem.points
    margin = exact_margin(net, points)
    values = outputs(net, points)[:, 0].astype(np.float64)
    smallest = float((points.y * values).min())
    on = preactivations(net, points)[..., 0] > 0.0
    row: TrajectoryRow = {
        "t": t,
        "ln_tau": log_tau,
        "margin": margin.value,
        "gap": points.margin_optimum - margin.value,
        "x_star": margin.boundary,
        "log_loss": float(log_loss(net, problem)[0]),
        "f_min": smallest,
        "pattern": "|".join("".join("01"[int(flag)] for flag in column) for column in on.T),
    }
    row |= {f"f{i + 1}": float(value) for i, value in enumerate(values)}
    row |= {f"norm_margin_{name}": smallest / size for name, size in _norms(net, problem).items()}
    hidden = net.hidden[..., 0].astype(np.float64)
    if len(hidden) == 2:
        row["delta_b"] = abs(float(hidden[1, -1] - hidden[0, -1]))
    return {**row, **_weights(net, problem)}, margin


def _norms(net: Nets, problem: ToyProblem) -> Mapping[str, float]:
    """Return ‖θ‖ in three geometries; the product over both layers where v is trained, since f scales with it."""
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


def _weights(net: Nets, problem: ToyProblem) -> TrajectoryRow:
    """Return w1, b1, v1, w2, …; w1_1, w1_2 … in more than one dimension."""
    row: TrajectoryRow = {}
    dim = problem.points.x.shape[1]
    for j, (neuron, v) in enumerate(zip(net.hidden[..., 0].tolist(), net.output[:, 0].tolist()), 1):
        if dim == 1:
            row[f"w{j}"] = neuron[0]
        else:
            row |= {f"w{j}_{i}": value for i, value in enumerate(neuron[:-1], 1)}
        row |= {f"b{j}": neuron[-1], f"v{j}": v}
    return row


def value_at_loss(rows: Sequence[TrajectoryRow], level: float, key: str) -> float | None:
    """Return a value of the rows where ln L passes a level, interpolated in ln L between two states.

    Gaps are interpolated by their inverse, which is affine in ln L once the start is forgotten.
    """
    for before, after in pairwise(rows):
        high, low = before["log_loss"], after["log_loss"]
        if high > level >= low and before.get(key) is not None and after.get(key) is not None:
            share, first, second = (high - level) / (high - low), before[key], after[key]
            if key == "gap" and min(first, second) > ZERO:
                return 1.0 / (1.0 / first + share * (1.0 / second - 1.0 / first))
            return first + share * (second - first)
    return None


def classify(log_t: Floats, gap: Floats, settled: float, stop: float = np.inf) -> Rate:
    """Return the class and constants of one trajectory.

    The class is "log" if r² > 0.999 over at least two decades and the slopes of both halves agree to 2 %: a
    power of ln t other than -1 also looks straight through a narrow window, but bends. It is "power" if
    r² > 0.999 for ln gap over the last decade with an exponent in [0.8, 1.2], which no logarithm imitates.

    Args:
        log_t: (n,) ascending, ln t or ln τ: a constant shift changes no slope.
        gap: (n,) distance of the margin from its limit.
        settled: the smallest log_t at which the start is forgotten (`closed_form.Separated.settled`).
        stop: nothing after this is used (stagnation).
    """
    is_usable = np.isfinite(log_t) & np.isfinite(gap) & (log_t < stop)
    log_t, gap = log_t[is_usable], gap[is_usable]
    if len(log_t) < 3:
        return Rate("undetermined", why="fewer than three states can be used")
    last = log_t >= log_t[-1] - DECADES * DECADE - 1e-9
    if (gap[last] < ZERO).all():
        return Rate("zero", window=_window(log_t[last]))
    positive = gap > 0.0
    final = positive & (log_t >= log_t[-1] - DECADE - 1e-9)
    power = _power_law(log_t[final], gap[final])
    inside = (log_t >= settled) & positive
    x, y = log_t[inside], 1.0 / gap[inside]
    span = (x[-1] - x[0]) / DECADE if len(x) > 2 else 0.0
    if power is not None and POWER[0] <= power[0] <= POWER[1] and power[1] > GOOD:
        return Rate("power", window=_window(log_t[final]), exponent=power[0], exponent_r2=power[1])
    exponent, exponent_r2 = power if power is not None else (None, None)
    if span < LEAST_DECADES - 1e-9:
        why = f"{span:.1f} decades after the start is forgotten; 2 are needed"
        return Rate("undetermined", exponent=exponent, exponent_r2=exponent_r2, why=why)
    slope, r2 = _fit(x, y)
    later = x > 1.0
    log_exponent = -_fit(np.log(x[later]), np.log(1.0 / y[later]))[0] if later.sum() > 2 else None
    middle = 0.5 * (x[0] + x[-1])
    halves = [_fit(x[part], y[part])[0] for part in (x <= middle, x >= middle) if part.sum() > 1]
    bend = abs(halves[-1] - halves[0]) / abs(slope) if slope else np.inf
    straight = slope > 0.0 and r2 > GOOD and bend < CURVED
    is_log = straight and span >= DECADES - 1e-9
    if is_log:
        why = ""
    elif straight:
        why = f"{span:.1f} decades after the start is forgotten; 2 are needed"
    else:
        why = f"1/gap is not straight in ln t (r² {r2:.5f}, slopes of the halves differ by {bend:.1%})"
    return Rate(
        "log" if is_log else "undetermined",
        constant=1.0 / slope if straight else None,
        slope=slope,
        r2=r2,
        window=_window(x),
        exponent=exponent,
        exponent_r2=exponent_r2,
        log_exponent=log_exponent,
        why=why,
    )


def _power_law(x: Floats, gap: Floats) -> tuple[float, float] | None:
    """Return (exponent, r²) of gap ~ t^(-exponent); None where less than a decade is left."""
    if len(x) < 3 or x[-1] - x[0] < 0.9 * DECADE:
        return None
    slope, r2 = _fit(x, np.log(gap))
    return -slope, r2


def _fit(x: Floats, y: Floats) -> tuple[float, float]:
    """Return (slope, r²) of a least-squares line."""
    dx, dy = x - x.mean(), y - y.mean()
    slope = float(dx @ dy / (dx @ dx)) if len(x) > 1 else float("nan")
    total = float(dy @ dy)
    rest = dy - slope * dx
    return slope, 1.0 - float(rest @ rest) / total if total > 0.0 else 1.0


def _window(x: Floats) -> tuple[float, float]:
    return float(x[0]), float(x[-1])


def judge(
    run: MarginRun,
    problem: ToyProblem,
    optimizer: OptimizerSpec,
    states: Sequence[ToyState],
    stop: float,
) -> MarginRun:
    """Fill in rows, status, predicted constant and rate of a run.

    Args:
        run: with its name and number; changed in place and returned.
        problem: what was minimized.
        optimizer: what trained it.
        states: in ascending order of time.
        stop: ln τ from which numbers mean nothing any more (stagnation).
    """
    points = problem.points
    last = states[-1][2]
    is_finite = [all(bool(np.isfinite(part).all()) for part in net) for _, _, net in states]
    if not all(is_finite):
        run.status = "diverged"
        states = [state for state, finite in zip(states, is_finite) if finite]
    elif bool(is_dead(last, problem)[0]):
        run.status = "dead"
    separated = _first_separated(states, problem)
    run.facts |= {
        "margin_opt": points.margin_optimum,
        "margin_inf": separated.margin_limit if separated and optimizer.kind in CONSTANT_OF_GD else None,
        "separated_at": next(
            (t for t, log_tau, _ in states if separated and log_tau == separated.log_tau), None
        ),
    }
    margin: ExactMargin | None = None
    for t, log_tau, net in states:
        row, margin = measure(net, problem, t, log_tau)
        run.rows.append(row)
    if run.status != "ok":
        return run
    run.status = "flat" if margin is not None and margin.flat else "ok"
    run.predicted = _predicted_constant(optimizer, separated, run.rows)
    limit = run.facts["margin_inf"] if run.facts["margin_inf"] is not None else points.margin_optimum
    times = np.array([row["ln_tau"] for row in run.rows])
    gaps = np.abs(limit - np.array([row["margin"] for row in run.rows]))
    run.rate = classify(times, gaps, _settled(separated, run.rows), stop)
    if not math.isclose(limit, points.margin_optimum, abs_tol=1e-9):
        run.facts["note"] = (
            "the margin tends to margin_inf, not to the optimum; the rate is that of margin_inf - margin"
        )
    _add_events(run)
    return run


def _first_separated(states: Sequence[ToyState], problem: ToyProblem) -> SeparatedState | None:
    return next(
        (state for _, log_tau, net in states if (state := separated_state(net, problem, log_tau))), None
    )


def _settled(state: SeparatedState | None, rows: Sequence[TrajectoryRow]) -> float:
    """Return ln τ from which the start is forgotten; without a closed form from the first row that is all right."""
    if state is not None:
        return state.settled
    first = next((row for row in rows if row["f_min"] > 0.0), None)
    if first is None:
        return math.inf
    biggest = max(abs(value) for key, value in first.items() if key[0] == "f" and key[1:].isdigit())
    return max(math.log(100.0) + biggest, first["ln_tau"])


def _predicted_constant(
    optimizer: OptimizerSpec, state: SeparatedState | None, rows: Sequence[TrajectoryRow]
) -> float | None:
    kind = optimizer.kind
    if state is None or optimizer.weight_decay:
        return None
    if kind in CONSTANT_OF_GD:
        return state.constant if kind == "gd" or _is_standard(state) else None
    # Newton–Schulz leaves the two rows of unequal length.
    is_exact = optimizer.options.get("orthogonalizer", "auto") in EXACT_FACTORS
    if kind in CONSTANT_AT_START and is_exact and _is_standard(state) and "delta_b" in rows[0]:
        return float(next(row["delta_b"] for row in rows if row["ln_tau"] >= state.log_tau))
    return None


def _is_standard(state: SeparatedState) -> bool:
    return math.isclose(state.a, 1.0) and math.isclose(state.c, 1.0) and state.log_rate == (0.0, 0.0)


def _add_events(run: MarginRun) -> None:
    """Add the first step at which both outputs agree to 1e-3 (what convergence looks like), and the largest gap."""
    rows = run.rows
    hits = (
        row["t"]
        for row in rows
        if "f2" in row and "f3" not in row and abs(row["f1"] + row["f2"]) < HIT_TOLERANCE and row["t"]
    )
    right = [row for row in rows if row["f_min"] > 0.0] or rows
    peak = max(right, key=lambda row: row["gap"])
    run.facts |= {
        "t_hit": next(hits, None),
        "gap_peak": peak["gap"],
        "gap_peak_ln_tau": peak["ln_tau"] if math.isfinite(peak["ln_tau"]) else None,
        "gap_last": rows[-1]["gap"],
        "margin_last": rows[-1]["margin"],
    }
