"""Warnings on what the arms bring along: learning rates, certificates, machines, code, foreign tables."""

from __future__ import annotations

import math
from collections.abc import Iterable

from analysis import formatting
from analysis.compare.caution import Caution, arm_labels, named
from analysis.compare.comparison import Arm, ComparisonSet

TUNED, UNTUNED, GIVEN = "tuned default", "untuned default", "given"
ELSEWHERE = "default tuned at another size"


def lr_standing(arm: Arm) -> str:
    """How the arm's learning rate came about; empty where that is not recorded."""
    if arm.tuning is not None:
        return f"tuned ({formatting.plural(len(arm.tuning.spent), 'trial')})"
    run = max(arm.runs, key=lambda r: len(r.summary))
    if run.text("lr_source") == "given":
        return GIVEN
    tuned = run.summary.get("lr_tuned")
    if tuned is False:
        # The source of the rate says "tuned at 1.8M": without the size, "untuned" would contradict it.
        return ELSEWHERE if run.text("lr_source").startswith("tuned") else UNTUNED
    return TUNED if tuned is True else ""


def learning_rates(chosen: ComparisonSet) -> Iterable[Caution]:
    """Untuned defaults, and arms whose rates had unequal care."""
    standings = {arm.label: lr_standing(arm) for arm in chosen.arms}
    untuned = [
        f"{arm.label} {formatting.significant(max(run.fact('lr') for run in arm.runs))}"
        for arm in chosen.arms
        if standings[arm.label] in (UNTUNED, ELSEWHERE)
    ]
    if untuned:
        text = f"Default learning rates that were not tuned at this size: {formatting.listing(untuned)}."
        yield Caution("untuned_lr", text)
    unknown = [label for label, standing in standings.items() if not standing]
    found = dict.fromkeys([TUNED, ELSEWHERE, UNTUNED, GIVEN, *filter(None, standings.values())])
    groups = {s: [label for label, own in standings.items() if own == s] for s in found}
    groups = {standing: labels for standing, labels in groups.items() if labels}
    if len(groups) > 1 or (groups and unknown):
        parts = [f"{formatting.listing(labels)} {standing}" for standing, labels in groups.items()]
        if unknown:
            parts.append(f"{formatting.listing(unknown)} not recorded")
        yield Caution("unequal_tuning", f"Unequal tuning of the learning rate: {'; '.join(parts)}.")


def tuning(chosen: ComparisonSet) -> Iterable[Caution]:
    """What a tuning study leaves open: a best on an edge, an optimizer without one, its own seed compared."""
    studies = [(arm, study) for arm in chosen.arms if (study := arm.tuning) is not None]
    on_edge = [
        f"{arm.label} {key} {formatting.significant(float(study.chosen.values[key]))} ({side} tried)"
        for arm, study in studies
        if study.chosen is not None
        for key, side in study.edges.items()
    ]
    if on_edge:
        text = f"Best setting on the edge of its search space, a better one may exist: {formatting.listing(on_edge)}"
        yield Caution("edge_of_space", f"{text}.")
    if lost := dict.fromkeys(label for _, study in studies for label in study.lost):
        who = formatting.listing(list(lost))
        yield Caution(
            "no_finite_trial", f"No tuning trial of {who} ended with a finite loss: not in this comparison."
        )
    failed = [
        f"{arm.label} {len(study.trials) - len(study.spent)} of {len(study.trials)}"
        for arm, study in studies
        if len(study.spent) < len(study.trials)
    ]
    if failed:
        yield Caution(
            "failed_trials", f"Tuning trials that failed or were not made: {formatting.listing(failed)}."
        )
    if same := [arm.label for arm, study in studies if study.seed in {run.seed for run in arm.runs}]:
        who = formatting.listing(same)
        text = f"{who} compared on the seed of the tuning trials: the best of several is too low there."
        yield Caution("tuning_seed", text)


def certificates(chosen: ComparisonSet) -> Iterable[Caution]:
    """Arms that run a cell (rule, engine, precision …) whose update is not known to be right."""
    if failed := named(chosen, lambda run: run.certificate == "failed"):
        yield Caution("certificate", f"The optimizer failed its certificate on this engine: {failed}.")
    reasons: dict[str, list[str]] = {}
    for arm in chosen.arms:
        for run in arm.runs:
            if run.certified is not None and run.certified.get("passed") is None:
                reason = str(run.certified.get("reason") or "uncertified cell")
                labels = reasons.setdefault(reason, [])
                labels += [arm.label] * (arm.label not in labels)
    for reason, labels in reasons.items():
        yield Caution("uncertified", f"No certificate for {formatting.listing(labels)}: {reason}.")
    if absent := arm_labels(chosen, lambda run: run.certified is None):
        who = "any optimizer" if len(absent) == len(chosen.arms) > 1 else formatting.listing(absent)
        yield Caution("uncertified", f"No certificate is recorded for {who}.")
    if stale := arm_labels(chosen, lambda run: (run.certified or {}).get("current") is False):
        text = f"The certificates of {formatting.listing(stale)} are of other sources than the runs'."
        yield Caution("stale_certificate", text, False)


def machines(chosen: ComparisonSet) -> Iterable[Caution]:
    """Devices, engines and world sizes that differ, and the code of the runs."""
    for key, word in (("device", "devices"), ("engine", "engines"), ("world_size", "world sizes")):
        values = sorted({run.text(key) for run in chosen.runs if run.text(key)})
        if len(values) > 1:
            text = f"Different {word} ({', '.join(values)}): losses compare; times and memory do not."
            yield Caution("different_machines", text)
    commits = sorted({run.commit for run in chosen.runs if run.commit})
    if len(commits) > 1:
        shown = ", ".join(commit[:10] for commit in commits[:4]) + (", …" if len(commits) > 4 else "")
        yield Caution("different_code", f"Made at {len(commits)} commits of the code: {shown}.", False)


def foreign(chosen: ComparisonSet) -> Iterable[Caution]:
    """Runs that stand on their table's word."""
    if who := named(chosen, lambda run: run.foreign):
        text = (
            f"Read from tables of other trainers: {who}. That data, budget and evaluation agree with the others' "
            "is what their comparison_key says; it is not checked."
        )
        yield Caution("foreign", text, False)
    finished = [run for run in chosen.runs if run.finished]
    silent = [key for key in ("steps", "tokens") if any(math.isnan(run.fact(key)) for run in finished)]
    if silent:
        lacking = named(chosen, lambda r: r.finished and any(math.isnan(r.fact(key)) for key in silent))
        text = f"Equal budgets can't be checked: {lacking} record no {formatting.listing(silent, 'or')}."
        yield Caution("unknown_budget", text)
