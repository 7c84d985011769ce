"""What the modes `mlp` and `head` found: tables, plots and the sentence that they carry."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import plotly.graph_objects as go

from analysis.formatting import listing, significant
from analysis.margin.head import DESCENT_STEPS
from analysis.margin.outputs import Finished
from analysis.margin.own_norms import wins_in_own_norm
from analysis.margin.plots import curves, log10_t, shown_runs
from analysis.margin.settings import Settings
from analysis.margin.trajectory import Row, Run
from analysis.pages.figures import Plot, colour, figure

GEOMETRIES = {"norm_margin_l2": "Frobenius", "norm_margin_linf": "max", "norm_margin_spec": "spectral"}
LOSSES = (-2.0, -5.0, -10.0, -20.0)
STEPS = "log₁₀ step"
OBSERVED = (
    "Observed, not proved. An attack radius is an upper bound of the margin, a certified radius a lower one; what lies "
    "between is not known. With biases, norms or attention a normalized margin is a heuristic."
)


def mlp(settings: Settings, runs: Sequence[Run]) -> Finished:
    """Networks on digits."""
    table = [_mlp_row(settings, runs, name) for name in dict.fromkeys(run.optimizer for run in runs)]
    own = [
        {"optimizer": run.optimizer, **{word: run.rows[-1].get(key) for key, word in GEOMETRIES.items()}}
        for run in shown_runs(runs)
        if run.rows
    ]
    fits = [
        {"optimizer": run.optimizer, **fit} for run in shown_runs(runs) for fit in run.facts.get("fits", [])
    ]
    more = {"normalized_margins": own, **({"fits": fits} if fits else {})}
    return Finished(
        runs, _notes(runs), _headline(settings, runs), OBSERVED, table, _plots(settings, runs), more
    )


def _mlp_row(settings: Settings, runs: Sequence[Run], name: str) -> dict[str, Any]:
    mine = [run for run in runs if run.optimizer == name]
    last = mine[0].rows[-1] if mine[0].rows else {}
    row: dict[str, Any] = {
        "optimizer": name,
        "runs": len(mine),
        "separated": sum(run.status == "ok" for run in mine),
        "train accuracy": last.get("train_accuracy"),
        "test accuracy": last.get("test_accuracy"),
        "ln loss": last.get("log_loss"),
        "q_min": last.get("q_min"),
    }
    for norm in settings.norms:
        row |= {
            f"{norm} lower": last.get(f"lower_{norm}_q50"),
            f"{norm} upper": last.get(f"upper_{norm}_q50"),
        }
    norm = settings.norms[0]
    for level in LOSSES:
        row[f"{norm} upper at ln L = {level:g}"] = _at_loss(mine[0].rows, level, f"upper_{norm}_q50")
    return row


def _at_loss(rows: Sequence[Row], level: float, key: str) -> float | None:
    for before, after in pairwise(rows):
        high, low = before["log_loss"], after["log_loss"]
        if high > level >= low and before.get(key) is not None and after.get(key) is not None:
            return before[key] + (high - level) / (high - low) * (after[key] - before[key])
    return None


def _notes(runs: Sequence[Run]) -> list[str]:
    found = [f"{run.optimizer}: {run.facts['note']}" for run in runs if run.facts.get("note")]
    broken = [run.optimizer for run in runs for row in run.rows if row.get("bracket_holds") is False]
    found += [f"{name}: a certified radius exceeds an attack's: one of the two is wrong" for name in broken]
    return list(dict.fromkeys(found))


def _headline(settings: Settings, runs: Sequence[Run]) -> str:
    norm = settings.norms[0]
    shown = [
        run for run in shown_runs(runs) if run.rows and run.rows[-1].get(f"upper_{norm}_q50") is not None
    ]
    if not shown:
        return "No run classifies a point."
    parts = [
        f"{run.optimizer} {significant(run.rows[-1][f'lower_{norm}_q50'])}–"
        f"{significant(run.rows[-1][f'upper_{norm}_q50'])}"
        for run in shown
    ]
    word = {"l2": "ℓ2", "linf": "ℓ∞"}[norm]
    return f"Median {word} margin between certificate and attack: {listing(parts)}."


def _plots(settings: Settings, runs: Sequence[Run]) -> list[Plot]:
    shown = [run for run in shown_runs(runs) if run.rows]
    found = [_bands(shown, norm) for norm in settings.norms]
    for key, word in GEOMETRIES.items():
        built = figure(
            curves(shown, log10_t, lambda r, key=key: r.get(key)), **_axes(STEPS, f"q_min / {word} norms")
        )
        found.append(Plot(key, f"Normalized margin, {word} norm of each layer", "Training set.", built, 300))
    norm = settings.norms[0]
    by_loss = curves(shown, lambda r: -r["log_loss"], lambda r: r.get(f"upper_{norm}_q50"))
    caption = "Optimizers lower the loss at different speeds; at equal loss that is taken out."
    built = figure(by_loss, **_axes("−ln training loss", "median attack radius"))
    found.append(Plot("by-loss", "Attack radius at equal loss", caption, built, 320))
    return found


def _bands(runs: Sequence[Run], norm: str) -> Plot:
    traces: list[Any] = []
    for arm, run in enumerate(runs):
        rows = [row for row in run.rows if row.get(f"upper_{norm}_q50") is not None and row["t"]]
        if not rows:
            continue
        x = [log10_t(row) for row in rows]
        low, high = ([row[f"{side}_{norm}_q50"] for row in rows] for side in ("lower", "upper"))
        outline = [*x, *x[::-1]]
        meta = {"arm": arm, "band": True}
        traces.append(
            go.Scatter(
                x=outline, y=[*high, *low[::-1]], fill="toself", mode="none", opacity=0.2, fillcolor=colour(arm),
                hoverinfo="skip", showlegend=False, meta=meta,
            )
        )  # fmt: skip
    traces += curves(runs, log10_t, lambda r: r.get(f"upper_{norm}_q50"))
    word = {"l2": "ℓ2", "linf": "ℓ∞"}[norm]
    caption = (
        "Lines: attack, an upper bound. Bands reach down to the certified radius. Medians over test points."
    )
    built = figure(traces, **_axes(STEPS, f"{word} radius"))
    return Plot(f"band-{norm}", f"Input margin, {word}", caption, built, 360)


def _axes(x: str, y: str) -> dict[str, Any]:
    return {"xaxis": {"title": {"text": x}}, "yaxis": {"title": {"text": y}}}


def head(settings: Settings, runs: Sequence[Run]) -> Finished:
    """Heads of language models."""
    last = {run.optimizer: run.rows[-1] for run in runs}
    hidden = ("gap", "ln_tau", "margin")
    table = [
        {"optimizer": name, **{key: value for key, value in row.items() if key not in hidden}}
        for name, row in last.items()
    ]
    own = [
        {"checkpoints of": run.optimizer, "descent": descent, **found}
        for run in runs
        for descent, found in run.facts.get("own_norms", {}).items()
    ]
    notes = [
        f"{run.optimizer}: no token is predicted: there is no margin" for run in runs if run.status == "dead"
    ]
    notes += [
        f"{run.optimizer}: the heads fitted to its features are not ordered by their own norms after "
        f"{DESCENT_STEPS} steps: the table of own norms is not the limit's"
        for run in runs
        if run.facts.get("own_norms") and not wins_in_own_norm(run.facts["own_norms"])
    ]
    norm = settings.norms[0]
    key = f"head_{norm}_q50"
    parts = [
        f"{name} {significant(row[key])} (step {row['t']:g}, {row['accuracy']:.0%} of the tokens)"
        for name, row in last.items()
        if row.get(key) is not None
    ]
    word = {"l2": "ℓ2", "linf": "ℓ∞"}[norm]
    headline = (
        f"Median exact {word} margin of the head where it predicts the token: {listing(parts)}."
        if parts
        else "No token is predicted."
    )
    scope = (
        "Exact for the last layer on frozen features, over the tokens that are predicted. Radii in embedding space are "
        "upper bounds from a short attack on few tokens, divided by the median size of an embedding; nothing certifies "
        "the body. " + OBSERVED
    )
    plots = [
        Plot(
            "head",
            f"Exact {word} margin of the head",
            "Median over predicted tokens.",
            figure(curves(runs, log10_t, lambda r: r.get(key)), **_axes(STEPS, "margin")),
            320,
        )
    ]
    return Finished(runs, notes, headline, scope, table, plots, {"own_norms": own} if own else {})
