"""What a reader must know before believing a table: the warnings of a comparison, the grave ones first."""

from __future__ import annotations

import math
from collections.abc import Iterable

from analysis import formatting
from analysis.compare import standing_cautions
from analysis.compare.caution import Caution, arms_of, named
from analysis.compare.comparison import ComparisonSet, unequal_budgets
from analysis.runs.run import Run

COMPUTE_OPTIMAL = 20
"""Tokens per parameter near the compute-optimal budget (Hoffmann et al. 2022, arXiv 2203.15556)."""


def cautions(chosen: ComparisonSet) -> list[Caution]:
    """All warnings of one set, grave ones first."""
    found: list[Caution] = []
    for check in (
        _seeds,
        _budgets,
        _endings,
        _resumes,
        _entropy,
        _undertrained,
        _epochs,
        standing_cautions.learning_rates,
        standing_cautions.tuning,
        standing_cautions.certificates,
        standing_cautions.machines,
        standing_cautions.foreign,
        _steps,
        _records,
    ):
        found.extend(check(chosen))
    return sorted(found, key=lambda caution: not caution.grave)


def _seeds(chosen: ComparisonSet) -> Iterable[Caution]:
    short = [arm.label for arm in chosen.arms if arm.final.n == 1]
    if len(chosen.arms) > 1 and short:
        who = f"all {len(short)} optimizers" if len(short) == len(chosen.arms) > 4 else _some(short, 6)
        yield Caution("one_seed", f"n = 1: {who} finished with one seed; no interval, no test.")
    missing: dict[tuple[int, ...], list[str]] = {}
    for arm in chosen.arms:
        lacks = tuple(sorted(set(chosen.seeds) - {run.seed for run in arm.runs}))
        missing.setdefault(lacks, []).append(arm.label)
    for lacks, labels in missing.items():
        if lacks:
            seeds = formatting.listing([str(seed) for seed in lacks], "or")
            text = f"{_some(labels, 6)} {'has' if len(labels) == 1 else 'have'} no run with seed {seeds}"
            yield Caution("missing_seed", f"{text}; pairs use common seeds only.")


def _budgets(chosen: ComparisonSet) -> Iterable[Caution]:
    for phrase in unequal_budgets(chosen):
        yield Caution("unequal_budget", f"Unequal budgets: {phrase}.")


def _endings(chosen: ComparisonSet) -> Iterable[Caution]:
    names = {
        "diverged": "diverged",
        "failed": "failed",
        "interrupted": "interrupted",
        "running": "not over (or killed)",
    }
    for state, word in names.items():
        ended = [run for run in chosen.runs if run.state == state]
        if ended:
            listed = named(chosen, lambda run, state=state: run.state == state)
            yield Caution(state, f"{formatting.plural(len(ended), 'run')} {word}: {listed}.")


def _resumes(chosen: ComparisonSet) -> Iterable[Caution]:
    parts = []
    for arm, runs in arms_of(chosen, lambda run: bool(run.resumed_at)):
        for run in runs:
            steps = formatting.listing([formatting.grouped(step) for step in run.resumed_at])
            parts.append(f"{arm.label} seed {run.seed} at step {steps}")
    if parts:
        yield Caution("resumed", f"Resumed: {_some(parts)}. Seconds are summed over attempts.")


def _entropy(chosen: ComparisonSet) -> Iterable[Caution]:
    high = [arm.label for arm in chosen.arms if arm.final.n and arm.final.mean >= chosen.entropy]
    if high:
        yield Caution(
            "above_entropy",
            f"{formatting.listing(high)} ended at or above the unigram entropy of the corpus "
            f"({formatting.loss(chosen.entropy)} nats/token): word frequencies alone do as well.",
        )


def _undertrained(chosen: ComparisonSet) -> Iterable[Caution]:
    sizes = [(run.fact("tokens"), run.fact("parameters")) for run in chosen.runs if run.finished]
    ratio = max((tokens / size for tokens, size in sizes if tokens >= 0 and size > 0), default=math.nan)
    if ratio < COMPUTE_OPTIMAL:
        text = (
            f"Undertrained: {formatting.significant(ratio, 2)} tokens per parameter, where about {COMPUTE_OPTIMAL} are "
            "compute-optimal; rankings this early in training often change."
        )
        yield Caution("undertrained", text)


def _epochs(chosen: ComparisonSet) -> Iterable[Caution]:
    epochs = max((value for run in chosen.runs if math.isfinite(value := run.fact("epochs"))), default=0.0)
    if epochs > 1:
        yield Caution(
            "epochs",
            f"More than one epoch: the training text was read {formatting.significant(epochs, 2)} times.",
        )


def _steps(chosen: ComparisonSet) -> Iterable[Caution]:
    for key, word, grave in (
        ("skipped_steps", "masked steps with non-finite gradients", True),
        ("optimizer_fallbacks", "factorizations fell back to another method", False),
    ):
        arms = [
            (arm.label, sum(v for run in arm.runs if math.isfinite(v := run.fact(key))))
            for arm in chosen.arms
        ]
        hit = [f"{label} {formatting.grouped(n)}" for label, n in arms if n]
        if hit:
            yield Caution(key, f"{formatting.listing(hit)} {word}.", grave)


def _records(chosen: ComparisonSet) -> Iterable[Caution]:
    for line in chosen.set_aside:
        yield Caution("set_aside", f"{line}.", False)
    said: dict[tuple[str, str], list[Run]] = {}
    for run in chosen.runs:
        listed = run.summary.get("warnings")
        for note in run.notes:
            said.setdefault(("record", f"{note}."), []).append(run)
        for line in listed if isinstance(listed, list) else ():
            said.setdefault(("run_warning", str(line)), []).append(run)
    for (code, line), runs in said.items():
        everyone = len(runs) == len(chosen.runs) > 1
        who = "all runs" if everyone else _some([run.where for run in runs])
        yield Caution(code, f"{who}: {line}", False)


def _some(names: list[str], most: int = 4) -> str:
    """``a, b and c``; ``a, b, c, d and 9 more`` where they are many."""
    if len(names) <= most:
        return formatting.listing(names)
    return formatting.listing([*names[:most], f"{len(names) - most} more"])
