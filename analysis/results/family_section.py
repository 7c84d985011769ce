"""The section on a family of optimizers at one model size, and what its runs say about the claims made for SUMO.

The claims are those of the SUMO paper (arXiv 2505.24749): about 1.6 times fewer steps to the result of GaLore (Figure
2), exact SVD before Newton–Schulz in the subspace (Lemma 3.2, Tables 2 and 7), up to 20 % less memory, and stability.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from analysis.comparison import seed_noise
from analysis.comparison.sets import Arm, ComparisonSet
from analysis.results import claims, study_section, study_summary
from analysis.results.claims import Estimate, Losses, Outcome
from analysis.results.markdown import fixed, render, table

FEWER_STEPS = 1.6
LESS_MEMORY = 0.20


class ClaimRow(NamedTuple):
    """One claim with what the runs say about it."""

    claim: str
    figure: str
    estimate: str
    outcome: str


def section(title: str, summary: Mapping[str, Any]) -> str:
    """Return the section as Markdown."""
    comparison = study_summary.to_comparison(summary)
    rows = claim_rows(summary, comparison)
    values = study_section.head(summary, comparison)
    return render(
        "family.md.j2",
        {
            **values,
            "heading": title,
            "claims": table(("claim", "figure", "estimate (95 % interval)", "outcome"), rows),
            "tolerance": claims.TOLERANCE,
            "missing": [label for label in ("sumo", "sumo_ns5", "galore") if not _finals(comparison, label)],
        },
    )


def claim_rows(summary: Mapping[str, Any], comparison: ComparisonSet) -> list[ClaimRow]:
    """Return the claims for which the study has runs of both arms."""
    arms = {arm.label: arm for arm in comparison.arms if arm.final.n}
    rows: list[ClaimRow] = []
    sumo = arms.get("sumo")
    if sumo is None:
        return rows
    if (galore := arms.get("galore")) is not None:
        rows += [*_steps(sumo, galore), *_memory(sumo, galore)]
    if (ns5 := arms.get("sumo_ns5")) is not None:
        rows += _orthogonalization(sumo, ns5)
    sd = seed_noise.pooled([list(arm.results(comparison.measure).values()) for arm in arms.values()]).sd
    for other in ("galore", "adamw"):
        if other in arms:
            rows += _stability(summary, sumo, arms[other], sd)
    return rows


def _steps(sumo: Arm, galore: Arm) -> list[ClaimRow]:
    found = claims.step_ratio(_curves(sumo), _curves(galore))
    shown = _interval(found, 2)
    figure = "GaLore's steps over SUMO's to the worse of the two final losses"
    return [
        ClaimRow("SUMO needs fewer steps than GaLore to the same loss", figure, shown, found.outcome(1.0)),
        ClaimRow(f"{FEWER_STEPS} times fewer", "the same", shown, found.outcome(FEWER_STEPS)),
    ]


def _memory(sumo: Arm, galore: Arm) -> list[ClaimRow]:
    rows = []
    for what, of in (
        ("optimizer state", _state),
        ("optimizer state of the hidden matrices", _hidden_state),
        ("weights, gradients and optimizer state", _held),
    ):
        ours, theirs = of(sumo), of(galore)
        if not (math.isfinite(ours) and theirs > 0):
            continue
        saved = 1 - ours / theirs
        outcome = Outcome.SUPPORTED if saved >= LESS_MEMORY else Outcome.NOT_SUPPORTED
        sizes = [fixed(size / study_section.MIB, 2) for size in (ours, theirs)]
        shown = f"{fixed(100 * saved, 1)} % ({sizes[0]} against {sizes[1]} MiB)"
        rows.append(
            ClaimRow(f"{LESS_MEMORY:.0%} less memory than GaLore", f"{what}, measured", shown, outcome)
        )
    return rows


def _orthogonalization(sumo: Arm, ns5: Arm) -> list[ClaimRow]:
    lower = claims.difference(_by_seed(ns5), _by_seed(sumo))
    ratio = claims.step_ratio(_curves(sumo), _curves(ns5))
    claim = "exact SVD in the subspace is better than five Newton–Schulz steps"
    return [
        ClaimRow(claim, "loss of sumo_ns5 − loss of sumo, nats/token", _interval(lower, 4), lower.outcome()),
        ClaimRow(
            "the same, in steps",
            "steps of sumo_ns5 over those of sumo",
            _interval(ratio, 2),
            ratio.outcome(1.0),
        ),
    ]


def _stability(summary: Mapping[str, Any], sumo: Arm, other: Arm, sd: float) -> list[ClaimRow]:
    spikes = claims.difference(_spikes(summary, other.label), _spikes(summary, sumo.label))
    ranges = [_trials(summary, arm.label) for arm in (sumo, other)]
    wider = claims.wider_range(ranges[0], ranges[1], sd)
    found = [claims.rate_range(*trials) for trials in ranges]
    each = [f"{'at least ' if math.isinf(one.outer) else ''}{one.width:.2f}" for one in found]
    shown = _interval(wider, 2)
    return [
        ClaimRow(
            f"SUMO's loss has fewer spikes than {other.label}'s",
            f"spikes a run, {other.label} − sumo",
            _interval(spikes, 2),
            spikes.outcome(),
        ),
        ClaimRow(
            f"SUMO tolerates a wider range of rates than {other.label}",
            f"factors of two within {claims.TOLERANCE} nats of the best: sumo {each[0]}, {other.label} {each[1]}",
            shown,
            wider.outcome(),
        ),
    ]


def _interval(found: Estimate, digits: int) -> str:
    if not math.isfinite(found.value):
        return "–"
    if math.isnan(found.low):
        return f"{fixed(found.value, digits)} (no interval: {'the values are equal' if found.n > 1 else 'one value'})"
    low = "unknown" if math.isinf(found.low) else fixed(found.low, digits)
    high = "unknown" if math.isinf(found.high) else fixed(found.high, digits)
    return f"{fixed(found.value, digits)} ({low} to {high})"


def _finals(comparison: ComparisonSet, label: str) -> bool:
    return any(arm.label == label and arm.final.n for arm in comparison.arms)


def _by_seed(arm: Arm) -> dict[int, float]:
    return {run.seed: run.final_loss for run in arm.finished}


def _curves(arm: Arm) -> dict[int, Losses]:
    return {run.seed: (run.metrics["step"], run.metrics["val/loss"]) for run in arm.finished}


def _state(arm: Arm) -> float:
    return arm.mean("memory_bytes", "optimizer_state")


def _hidden_state(arm: Arm) -> float:
    aux = arm.mean("state_bytes", "aux")
    return _state(arm) - aux


def _held(arm: Arm) -> float:
    return sum(arm.mean("memory_bytes", part) for part in study_summary.MEMORY)


def _spikes(summary: Mapping[str, Any], label: str) -> dict[int, float]:
    return {
        run["seed"]: float(run["spikes"])
        for arm in summary["arms"]
        if arm["arm"] == label
        for run in arm["runs"]
        if run["state"] == "finished" and run["spikes"] is not None
    }


def _trials(summary: Mapping[str, Any], label: str) -> tuple[Sequence[float], Sequence[float]]:
    """Return learning rates and losses of the trials that ended, at one seed."""
    trials = [
        trial
        for arm in summary["arms"]
        if arm["arm"] == label
        for trial in arm["trials"]
        if trial["state"] in ("finished", "diverged")
    ]
    return (
        [float(trial["values"]["lr"]) for trial in trials],
        [math.inf if trial["loss"] is None else trial["loss"] for trial in trials],
    )
