"""What a reader must know before believing a table: the warnings of a comparison, the grave ones first."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from analysis.compare import words
from analysis.compare.comparison import Arm, ComparisonSet, unequal_budgets
from analysis.compare.runs import Run


@dataclass(frozen=True)
class Caution:
    """One warning. ``grave``: it touches the verdict (red in the report); else it is a note on the record."""

    code: str
    message: str
    grave: bool = True


def cautions(chosen: ComparisonSet) -> list[Caution]:
    """All warnings of one set, grave ones first."""
    found: list[Caution] = []
    for check in (
        _seeds,
        _budgets,
        _endings,
        _entropy,
        _epochs,
        _learning_rates,
        _machines,
        _certificates,
        _steps,
        _records,
    ):
        found.extend(check(chosen))
    return sorted(found, key=lambda caution: not caution.grave)


def _seeds(chosen: ComparisonSet) -> Iterable[Caution]:
    short = [arm.label for arm in chosen.arms if arm.final.n == 1]
    if len(chosen.arms) > 1 and short:
        yield Caution(
            "one_seed", f"n = 1: {words.listing(short)} finished with one seed; no interval, no test."
        )
    missing: dict[tuple[int, ...], list[str]] = {}
    for arm in chosen.arms:
        lacks = tuple(sorted(set(chosen.seeds) - {run.seed for run in arm.runs}))
        missing.setdefault(lacks, []).append(arm.label)
    for lacks, labels in missing.items():
        if lacks:
            seeds = words.listing([str(seed) for seed in lacks], "or")
            text = f"{words.listing(labels)} {'has' if len(labels) == 1 else 'have'} no run with seed {seeds}"
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
            arms = _arms_of(chosen, lambda run, state=state: run.state == state)
            listed = words.listing([_where(arm, runs) for arm, runs in arms])
            yield Caution(state, f"{words.plural(len(ended), 'run')} {word}: {listed}.")


def _entropy(chosen: ComparisonSet) -> Iterable[Caution]:
    high = [arm.label for arm in chosen.arms if arm.final.n and arm.final.mean >= chosen.entropy]
    if high:
        yield Caution(
            "above_entropy",
            f"{words.listing(high)} ended at or above the unigram entropy of the corpus "
            f"({words.loss(chosen.entropy)} nats/token): word frequencies alone do as well.",
        )


def _epochs(chosen: ComparisonSet) -> Iterable[Caution]:
    epochs = max((value for run in chosen.runs if math.isfinite(value := run.fact("epochs"))), default=0.0)
    if epochs > 1:
        yield Caution(
            "epochs", f"More than one epoch: the training text was read {words.significant(epochs, 2)} times."
        )


def _learning_rates(chosen: ComparisonSet) -> Iterable[Caution]:
    rates = []
    for arm in chosen.arms:
        run = max(arm.runs, key=lambda r: len(r.summary))
        if run.summary.get("lr_tuned") is False and run.text("lr_source") != "given":
            rates.append(f"{arm.label} {words.significant(run.fact('lr'))}")
    if rates:
        text = f"Default learning rates that were not tuned at this size: {words.listing(rates)}."
        yield Caution("untuned_lr", text)


def _machines(chosen: ComparisonSet) -> Iterable[Caution]:
    for key, word in (("device", "devices"), ("engine", "engines"), ("world_size", "world sizes")):
        values = sorted({run.text(key) for run in chosen.runs if run.text(key)})
        if len(values) > 1:
            text = f"Different {word} ({', '.join(values)}): losses compare; times and memory do not."
            yield Caution("different_machines", text)


def _certificates(chosen: ComparisonSet) -> Iterable[Caution]:
    failed = _arms_of(chosen, lambda run: run.certificate == "failed")
    if failed:
        listed = words.listing([_where(arm, runs) for arm, runs in failed])
        yield Caution("certificate", f"The optimizer failed its certificate on this engine: {listed}.")


def _steps(chosen: ComparisonSet) -> Iterable[Caution]:
    for key, word, grave in (
        ("skipped_steps", "masked steps with non-finite gradients", True),
        ("optimizer_fallbacks", "factorizations fell back to another method", False),
    ):
        arms = [
            (arm.label, sum(v for run in arm.runs if math.isfinite(v := run.fact(key))))
            for arm in chosen.arms
        ]
        hit = [f"{label} {words.grouped(n)}" for label, n in arms if n]
        if hit:
            yield Caution(key, f"{words.listing(hit)} {word}.", grave)
    resumed = _arms_of(chosen, lambda run: any(note.startswith("resumed") for note in run.notes))
    if resumed:
        listed = words.listing([_where(arm, runs) for arm, runs in resumed])
        yield Caution("resumed", f"Resumed after an interruption: {listed}.", False)


def _records(chosen: ComparisonSet) -> Iterable[Caution]:
    for line in chosen.set_aside:
        yield Caution("set_aside", f"{line}.", False)
    for run in chosen.runs:
        for note in run.notes:
            if not note.startswith("resumed"):
                yield Caution("record", f"{run.where}: {note}.", False)
    said: dict[str, list[Run]] = {}
    for run in chosen.runs:
        listed = run.summary.get("warnings")
        for line in listed if isinstance(listed, list) else ():
            said.setdefault(str(line), []).append(run)
    for line, runs in said.items():
        who = "all runs" if len(runs) == len(chosen.runs) else words.listing([run.where for run in runs[:4]])
        more = f" and {len(runs) - 4} more" if len(runs) > 4 and len(runs) != len(chosen.runs) else ""
        yield Caution("run_warning", f"{who}{more}: {line}", False)


def _arms_of(chosen: ComparisonSet, test: Callable[[Run], bool]) -> list[tuple[Arm, list[Run]]]:
    picked = [(arm, [run for run in arm.runs if test(run)]) for arm in chosen.arms]
    return [(arm, runs) for arm, runs in picked if runs]


def _where(arm: Arm, runs: list[Run]) -> str:
    seeds = words.listing([str(run.seed) for run in runs])
    return f"{arm.label} (seed {seeds})" if len(runs) == 1 else f"{arm.label} (seeds {seeds})"
