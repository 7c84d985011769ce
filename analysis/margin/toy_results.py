"""What a toy or flow job found: table, notes, and the sentence that its numbers carry."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from analysis.formatting import listing, significant
from analysis.margin.outputs import Finished
from analysis.margin.plots import shown_runs, toy_plots
from analysis.margin.settings import Settings
from analysis.margin.trajectory import Row, Run

TABLE_STEPS = (10**3, 10**4, 10**5, 10**6)
TABLE_LOSSES = (-5.0, -10.0, -20.0, -40.0)
"""ln of the loss at which optimizers are compared beside equal steps."""
PROVED = (
    "Proved by others for two ReLU neurons and two points: gradient descent reaches the optimum, at the rate 1/ln t "
    "exactly (arXiv 2603.02095). Derived here, and checked against steps: the constant C. All else on this page was "
    "observed."
)


def finished(settings: Settings, runs: Sequence[Run]) -> Finished:
    """All of it."""
    return Finished(runs, notes_on(runs), headline(runs), scope(settings, runs), table(runs), toy_plots(runs))


def table(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """A row per optimizer: median and quartiles over the runs that separate the points, at equal steps and at
    equal loss."""
    rows = []
    for name in dict.fromkeys(run.optimizer for run in runs):
        alive = [run for run in runs if run.optimizer == name and run.status in ("ok", "flat")]
        classes = [run.rate.rate_class for run in alive]
        ratios = [run.rate.constant / run.predicted for run in alive if run.rate.constant and run.predicted]
        row: dict[str, Any] = {
            "optimizer": name,
            "runs": sum(run.optimizer == name for run in runs),
            "separated": len(alive),
            "rate_class": max(sorted(set(classes)), key=classes.count) if classes else None,
            "C_predicted": _median([run.predicted for run in alive]),
            "C_fit": _median([run.rate.constant for run in alive]),
            "C_fit/C_predicted": _median(ratios),
        }
        for t in TABLE_STEPS:
            row |= _spread(f"gap at {t:.0e}".replace("e+0", "e"), [_at_step(run.rows, t) for run in alive])
        for level in TABLE_LOSSES:
            row |= _spread(f"gap at ln L = {level:g}", [_at_loss(run.rows, level) for run in alive])
        rows.append(row)
    return rows


def notes_on(runs: Sequence[Run]) -> list[str]:
    """What a reader must know before believing a number, once per optimizer."""
    found: list[str] = []
    for run in runs:
        name = run.optimizer
        if run.facts.get("stagnated_at") is not None:
            found.append(
                f"{name}: from step {run.facts['stagnated_at']} on {run.facts['stagnation']}; "
                "nothing after it is used for a rate"
            )
        join = run.facts.get("join")
        if join and not join["passed"]:
            found.append(
                f"{name}: flow and steps disagree at step {join['t']}: the learning rate is too large for flow"
            )
        if run.facts.get("flow_stuck"):
            found.append(f"{name}: every neuron is off, so that flow stops")
        if run.facts.get("note"):
            found.append(f"{name}: {run.facts['note']}")
    return list(dict.fromkeys(found))


def headline(runs: Sequence[Run]) -> str:
    """Who closes the gap how fast."""
    rows = [row for row in table(runs) if row["separated"]]
    if not rows:
        return "No run separates the points."
    by_class: dict[str, list[str]] = {}
    for row in rows:
        by_class.setdefault(row["rate_class"], []).append(row["optimizer"])
    parts = []
    for kind, words in (
        ("log", "gap as 1/ln t"),
        ("power", "gap as a power of t"),
        ("zero", "no gap"),
        ("undetermined", "no settled rate yet"),
    ):
        if kind in by_class:
            parts.append(f"{listing(by_class[kind])}: {words}")
    return "; ".join(parts) + "."


def scope(settings: Settings, runs: Sequence[Run]) -> str:
    """What was run, and what of it is known."""
    shown = [run for run in shown_runs(runs) if run.status in ("ok", "flat") and run.rows]
    gaps = ", ".join(f"{run.optimizer} {significant(run.rows[-1]['gap'])}" for run in shown)
    last = shown[0].rows[-1] if shown else None
    at = f" Gap at ln τ = {last['ln_tau']:.4g}: {gaps}." if last else ""
    points = shown[0].facts["margin_opt"] if shown else None
    best = f" The optimal margin is {points:g}." if points is not None else ""
    loss = {"exp": "exponential", "logistic": "logistic"}[settings.loss]
    return f"{settings.mode}, {loss} loss.{best}{at} {PROVED}"


def _at_step(rows: Sequence[Row], t: int) -> float | None:
    return next((row["gap"] for row in rows if row["t"] is not None and abs(row["t"] - t) < 0.5), None)


def _at_loss(rows: Sequence[Row], level: float) -> float | None:
    """The gap where ln L passes a level, interpolated in ln L between two states."""
    for before, after in pairwise(rows):
        high, low = before["log_loss"], after["log_loss"]
        if high > level >= low:
            share = (high - level) / (high - low)
            return before["gap"] + share * (after["gap"] - before["gap"])
    return None


def _spread(key: str, values: Sequence[float | None]) -> dict[str, float | None]:
    found = [value for value in values if value is not None]
    if len(found) < 2:
        return {key: found[0] if found else None, f"{key} q1": None, f"{key} q3": None}
    low, middle, high = (float(q) for q in np.quantile(found, (0.25, 0.5, 0.75)))
    return {key: middle, f"{key} q1": low, f"{key} q3": high}


def _median(values: Sequence[float | None]) -> float | None:
    found = [value for value in values if value is not None]
    return float(np.median(found)) if found else None
