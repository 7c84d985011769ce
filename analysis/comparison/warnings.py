"""The warnings of a comparison: what a reader must know before trusting its table."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from analysis.comparison import seed_noise
from analysis.comparison.sets import Arm, ComparisonSet, unequal_budgets, unstated_workload
from analysis.formatting import grouped, listing, p_value, plural, significant
from analysis.formatting import loss as loss_text
from analysis.runs.measure import FRACTION
from analysis.runs.reading import number
from analysis.runs.run import LoadedRun
from harness.tasks.metrics import constant_prediction

COMPUTE_OPTIMAL = 20
"""Tokens per parameter near the compute-optimal budget (Hoffmann et al. 2022, arXiv 2203.15556)."""
TUNED, UNTUNED, GIVEN = "tuned default", "untuned default", "given"
ELSEWHERE = "default tuned at another size"

AUX_RATES = 10
"""Ratio of the rates of embeddings and head above which a comparison says so: more than three doublings of a ladder."""
SAME_METRIC = 1e-6
"""Largest difference between a metric as recorded and as recomputed: both are sums in fp64 of the same examples."""

RunTest = Callable[[LoadedRun], bool]


@dataclass(frozen=True)
class ReportWarning:
    """One warning. A severe one affects the verdict (red in the report); the others are notes."""

    code: str
    message: str
    severe: bool = True

    def to_json(self, set_key: str | None) -> dict[str, str | bool | None]:
        """Return the warning as an entry of ``warnings`` in the JSON document."""
        return {"set": set_key, "code": self.code, "message": self.message, "grave": self.severe}


def find_warnings(comparison: ComparisonSet) -> list[ReportWarning]:
    """Return all warnings of one set, severe ones first."""
    checks = (
        _seeds, _budgets, _unfinished, _resumes, _entropy, _undertrained, _epochs,
        _learning_rates, _aux_rates, _tuning, _examples, _certificates, _machines, _external, _steps, _records,
    )  # fmt: skip
    warnings = [warning for check in checks for warning in check(comparison)]
    return sorted(warnings, key=lambda warning: not warning.severe)


# Seeds, budgets and ends of runs


def _seeds(comparison: ComparisonSet) -> Iterable[ReportWarning]:
    single = [arm.label for arm in comparison.arms if arm.final.n == 1]
    if len(comparison.arms) > 1 and single:
        is_all = len(single) == len(comparison.arms) > 4
        who = f"all {len(single)} optimizers" if is_all else _shortened(single, 6)
        yield ReportWarning("one_seed", f"n = 1: {who} finished with one seed; no interval, no test.")
    if not comparison.tests.paired:
        text = "Welch's test is used: some logs state no seed, so that runs of two arms cannot be paired."
        yield ReportWarning("unpaired", text, severe=False)
        return
    missing: dict[tuple[int, ...], list[str]] = {}
    for arm in comparison.arms:
        lacking = tuple(sorted(set(comparison.seeds) - {run.seed for run in arm.runs}))
        missing.setdefault(lacking, []).append(arm.label)
    for lacking, labels in missing.items():
        if lacking:
            seeds = listing([str(seed) for seed in lacking], "or")
            text = f"{_shortened(labels, 6)} {'has' if len(labels) == 1 else 'have'} no run with seed {seeds}"
            yield ReportWarning("missing_seed", f"{text}; pairs use common seeds only.")


def _budgets(comparison: ComparisonSet) -> Iterable[ReportWarning]:
    for reason in unequal_budgets(comparison):
        yield ReportWarning("unequal_budget", f"Unequal budgets: {reason}.")


def _unfinished(comparison: ComparisonSet) -> Iterable[ReportWarning]:
    states = {
        "diverged": "diverged",
        "failed": "failed",
        "interrupted": "interrupted",
        "running": "not finished (or killed)",
    }
    for state, text in states.items():
        runs = [run for run in comparison.runs if run.state == state]
        if runs:
            who = _named(comparison, lambda run, state=state: run.state == state)
            yield ReportWarning(state, f"{plural(len(runs), 'run')} {text}: {who}.")


def _resumes(comparison: ComparisonSet) -> Iterable[ReportWarning]:
    resumed = [
        f"{arm.label} seed {run.seed} at step {listing([grouped(step) for step in run.resumed_at])}"
        for arm in comparison.arms
        for run in arm.runs
        if run.resumed_at
    ]
    if resumed:
        yield ReportWarning("resumed", f"Resumed: {_shortened(resumed)}. Seconds are summed over attempts.")


# What the losses can show


def _entropy(comparison: ComparisonSet) -> Iterable[ReportWarning]:
    # A metric has no entropy: NaN, above which is nothing.
    high = [arm.label for arm in comparison.arms if arm.final.n and arm.final.mean >= comparison.entropy]
    if high:
        yield ReportWarning(
            "above_entropy",
            f"{listing(high)} ended at or above the unigram entropy of the corpus "
            f"({loss_text(comparison.entropy)} nats/token): word frequencies alone reach that loss.",
        )


def _undertrained(comparison: ComparisonSet) -> Iterable[ReportWarning]:
    if not comparison.measure.is_loss:
        return  # fine-tuning starts from a trained model
    sizes = [(run.fact("tokens"), run.fact("parameters")) for run in comparison.runs if run.finished]
    ratio = max((tokens / size for tokens, size in sizes if tokens >= 0 and size > 0), default=math.nan)
    if ratio < COMPUTE_OPTIMAL:
        yield ReportWarning(
            "undertrained",
            f"Undertrained: {significant(ratio, 2)} tokens per parameter, where about {COMPUTE_OPTIMAL} are "
            "compute-optimal; rankings this early in training often change.",
        )


def _epochs(comparison: ComparisonSet) -> Iterable[ReportWarning]:
    if not comparison.measure.is_loss:
        return  # several epochs are the protocol of tasks
    epochs = max(
        (value for run in comparison.runs if math.isfinite(value := run.fact("epochs"))), default=0.0
    )
    if epochs > 1:
        text = f"More than one epoch: the training text was read {significant(epochs, 2)} times."
        yield ReportWarning("epochs", text)


# Learning rates and their tuning


def lr_standing(arm: Arm) -> str:
    """Return how the arm's learning rate was chosen; empty if that is not recorded."""
    if arm.tuning is not None:
        return f"tuned ({plural(len(arm.tuning.spent), 'trial')})"
    run = max(arm.runs, key=lambda r: len(r.summary))
    if run.text("lr_source") == "given":
        return GIVEN
    tuned = run.summary.get("lr_tuned")
    if tuned is False:
        # The source of the rate reads "tuned at 1.8M": "untuned" would contradict it.
        return ELSEWHERE if run.text("lr_source").startswith("tuned") else UNTUNED
    return TUNED if tuned is True else ""


def _learning_rates(comparison: ComparisonSet) -> Iterable[ReportWarning]:
    standings = {arm.label: lr_standing(arm) for arm in comparison.arms}
    untuned = [
        f"{arm.label} {significant(max(run.fact('lr') for run in arm.runs))}"
        for arm in comparison.arms
        if standings[arm.label] in (UNTUNED, ELSEWHERE)
    ]
    if untuned:
        text = f"Default learning rates that were not tuned at this size: {listing(untuned)}."
        yield ReportWarning("untuned_lr", text)
    unknown = [label for label, standing in standings.items() if not standing]
    kinds = dict.fromkeys([TUNED, ELSEWHERE, UNTUNED, GIVEN, *filter(None, standings.values())])
    groups = {kind: [label for label, own in standings.items() if own == kind] for kind in kinds}
    parts = [f"{listing(labels)} {kind}" for kind, labels in groups.items() if labels]
    if unknown and parts:
        parts.append(f"{listing(unknown)} not recorded")
    if len(parts) > 1:
        text = f"Unequal tuning of the learning rate: {'; '.join(parts)}."
        yield ReportWarning("unequal_tuning", text)


def _aux_rates(comparison: ComparisonSet) -> Iterable[ReportWarning]:
    rates: dict[str, float] = {}
    for arm in comparison.arms:
        options = arm.runs[0].optimizer_config
        # Without a value it follows lr. Records of AdamW from before it had the option have one rate for all.
        if "aux_lr" in options or arm.optimizer == "adamw":
            rate = number(options["aux_lr"] if options.get("aux_lr") is not None else options.get("lr"))
            if math.isfinite(rate) and rate > 0:
                rates[arm.label] = rate
    if not rates:
        return
    low, high = min(rates, key=lambda arm: rates[arm]), max(rates, key=lambda arm: rates[arm])
    if rates[high] > AUX_RATES * rates[low]:
        text = (
            f"Embeddings, head and vectors have AdamW's rate {significant(rates[low])} with {low} and "
            f"{significant(rates[high])} with {high} (aux_lr): in a small model this decides more than the rule. "
            "Tune it, or give all the same."
        )
        yield ReportWarning("aux_rates", text)


def _tuning(comparison: ComparisonSet) -> Iterable[ReportWarning]:
    studies = [(comparison.arms[index], study) for index, study in comparison.studies]
    on_edge = [
        f"{arm.label} {key} {significant(float(study.best_trial.values[key]))} ({side} tried)"
        for arm, study in studies
        if study.best_trial is not None
        for key, side in study.edges.items()
    ]
    if on_edge:
        text = "Best setting on the edge of its search space, a better one may lie beyond"
        yield ReportWarning("edge_of_space", f"{text}: {listing(on_edge)}.")
    if lost := dict.fromkeys(label for _, study in studies for label in study.lost):
        text = f"No tuning trial of {listing(list(lost))} ended with a finite loss: not in this comparison."
        yield ReportWarning("no_finite_trial", text)
    failed = [
        f"{arm.label} {len(study.trials) - len(study.spent)} of {len(study.trials)}"
        for arm, study in studies
        if len(study.spent) < len(study.trials)
    ]
    if failed:
        yield ReportWarning("failed_trials", f"Tuning trials that failed or were not run: {listing(failed)}.")
    same = [arm.label for arm, study in studies if study.seed in {run.seed for run in arm.runs}]
    if same:
        text = "compared on the seed of the tuning trials: the best of several losses is biased low there"
        yield ReportWarning("tuning_seed", f"{listing(same)} {text}.")


# Validation examples of tasks


def _examples(comparison: ComparisonSet) -> Iterable[ReportWarning]:
    measure, examples = comparison.measure, comparison.examples
    if measure.is_loss:
        return
    if tuned := [comparison.arms[index].label for index, _ in comparison.studies]:
        yield ReportWarning(
            "tuned_on_validation",
            f"The settings of {listing(tuned)} were selected on the same validation examples that this table "
            f"reports: {measure.shown_name} on unseen examples will be lower.",
        )
    if comparison.examples_problem:
        yield ReportWarning(
            "no_examples", f"No intervals over examples: {comparison.examples_problem}.", severe=True
        )
    if examples is None:
        return
    ranked = comparison.ranked()
    if measure.unit == FRACTION and len(ranked) > 1:
        best, second = (comparison.arms[index] for index in ranked[:2])
        gap, worth = abs(best.final.mean - second.final.mean), 1 / len(examples)
        if gap < worth:
            yield ReportWarning(
                "below_one_example",
                f"{best.label} and {second.label} differ by {measure.gap_text(gap, 2)}, less than one of the "
                f"{grouped(len(examples))} validation examples is worth ({measure.gap_text(worth, 2)}).",
            )
    constant: dict[str, list[LoadedRun]] = {}
    for run in comparison.runs:
        answers = run.predictions.predictions if run.finished and run.predictions is not None else []
        if answers and (line := constant_prediction(measure.name, answers)):
            constant.setdefault(line, []).append(run)
    for line, runs in constant.items():
        yield ReportWarning("constant_prediction", f"{_shortened([run.where for run in runs])}: {line}.")
    recomputed = [
        run.where
        for arm, finished in enumerate(examples.answers)
        for run in comparison.arms[arm].finished
        if run.seed in finished and abs(examples.recomputed(arm, run.seed) - run.final(measure)) > SAME_METRIC
    ]
    if recomputed:
        text = f"summary.json states another {measure.shown_name} than predictions.parquet gives"
        yield ReportWarning("other_predictions", f"{_shortened(recomputed)}: {text}.")


# Certificates, machines and records


def _certificates(comparison: ComparisonSet) -> Iterable[ReportWarning]:
    if failed := _named(comparison, lambda run: run.certificate == "failed"):
        yield ReportWarning("certificate", f"The optimizer failed its certificate on this engine: {failed}.")
    reasons: dict[str, dict[str, None]] = {}
    for arm in comparison.arms:
        for run in arm.runs:
            if run.certified is not None and run.certified.get("passed") is None:
                reason = str(run.certified.get("reason") or "uncertified cell")
                reasons.setdefault(reason, {})[arm.label] = None
    for reason, labels in reasons.items():
        yield ReportWarning("uncertified", f"No certificate for {listing(list(labels))}: {reason}.")
    if absent := _arm_labels(comparison, lambda run: run.certified is None):
        who = "any optimizer" if len(absent) == len(comparison.arms) > 1 else listing(absent)
        yield ReportWarning("uncertified", f"No certificate is recorded for {who}.")
    if stale := _arm_labels(comparison, lambda run: (run.certified or {}).get("current") is False):
        text = f"The certificates of {listing(stale)} were made with other sources than the runs."
        yield ReportWarning("stale_certificate", text, severe=False)


def _machines(comparison: ComparisonSet) -> Iterable[ReportWarning]:
    for key, noun in (("device", "devices"), ("engine", "engines"), ("world_size", "world sizes")):
        values = sorted({run.text(key) for run in comparison.runs if run.text(key)})
        if len(values) > 1:
            text = f"Different {noun} ({', '.join(values)}): losses are comparable; times and memory are not."
            yield ReportWarning("different_machines", text)
    commits = sorted({run.commit for run in comparison.runs if run.commit})
    if len(commits) > 1:
        shown = ", ".join(commit[:10] for commit in commits[:4]) + (", …" if len(commits) > 4 else "")
        text = f"Made at {len(commits)} commits of the code: {shown}."
        yield ReportWarning("different_code", text, severe=False)


def _external(comparison: ComparisonSet) -> Iterable[ReportWarning]:
    if len(comparison.arms) > 1 and (unstated := unstated_workload(comparison)):
        text = f"Nothing says that the runs have one workload: {unstated}. No verdict is given."
        yield ReportWarning("unknown_workload", text)
    if all(run.comparison_key.startswith("log:") for run in comparison.runs):
        text = "Read from public logs. That data, model and evaluation are the same is not checked."
        yield ReportWarning("foreign", text, severe=False)
        yield from _wide_spreads(comparison)
    elif who := _named(comparison, lambda run: run.is_external):
        text = (
            f"Read from tables of other trainers: {who}. Their comparison_key states that data, budget and "
            "evaluation are the same; this is not checked."
        )
        yield ReportWarning("foreign", text, severe=False)
    finished = [run for run in comparison.runs if run.finished]
    absent = [key for key in ("steps", "tokens") if any(math.isnan(run.fact(key)) for run in finished)]
    if absent:
        who = _named(comparison, lambda r: r.finished and any(math.isnan(r.fact(key)) for key in absent))
        text = f"Equal budgets cannot be checked: {who} record no {listing(absent, 'or')}."
        yield ReportWarning("unknown_budget", text)


def _wide_spreads(comparison: ComparisonSet) -> Iterable[ReportWarning]:
    samples = {arm.label: list(arm.results(comparison.measure).values()) for arm in comparison.arms}
    for label, (ratio, p) in seed_noise.wide_arms(samples).items():
        text = (
            f"The runs of {label} vary {significant(ratio, 2)} times as much as those of the other arms "
            f"({p_value(p)}, F-test, Holm): they may differ in more than the seed."
        )
        yield ReportWarning("wide_spread", text)


def _steps(comparison: ComparisonSet) -> Iterable[ReportWarning]:
    for key, text, severe in (
        ("skipped_steps", "skipped steps with non-finite gradients", True),
        ("optimizer_fallbacks", "factorizations used a fallback method", False),
    ):
        totals = {
            arm.label: sum(count for run in arm.runs if math.isfinite(count := run.fact(key)))
            for arm in comparison.arms
        }
        affected = [f"{label} {grouped(total)}" for label, total in totals.items() if total]
        if affected:
            yield ReportWarning(key, f"{listing(affected)} {text}.", severe)


def _records(comparison: ComparisonSet) -> Iterable[ReportWarning]:
    for line in comparison.replaced:
        yield ReportWarning("set_aside", f"{line}.", severe=False)
    lines: dict[tuple[str, str], list[LoadedRun]] = {}
    for run in comparison.runs:
        recorded = run.summary.get("warnings")
        for note in run.notes:
            lines.setdefault(("record", f"{note}."), []).append(run)
        for line in recorded if isinstance(recorded, list) else ():
            lines.setdefault(("run_warning", str(line)), []).append(run)
    for (code, line), runs in lines.items():
        is_all = len(runs) == len(comparison.runs) > 1
        who = "all runs" if is_all else _shortened([run.where for run in runs])
        yield ReportWarning(code, f"{who}: {line}", severe=False)


# Names of arms and runs


def _named(comparison: ComparisonSet, test: RunTest) -> str:
    """Return the runs that pass the test as ``adamw (seed 0) and sumo (all 3 runs)``; empty without any."""
    names = []
    for arm in comparison.arms:
        runs = [run for run in arm.runs if test(run)]
        if len(runs) == len(arm.runs) and (len(runs) > 4 or not all(run.has_seed for run in runs)):
            names.append(f"{arm.label} (all {len(runs)} runs)" if len(runs) > 1 else arm.label)
        elif runs:
            seeds = listing([str(run.seed) for run in runs])
            names.append(f"{arm.label} (seed{'s' if len(runs) > 1 else ''} {seeds})")
    return listing(names)


def _arm_labels(comparison: ComparisonSet, test: RunTest) -> list[str]:
    """Return the labels of the arms with a run that passes the test."""
    return [arm.label for arm in comparison.arms if any(map(test, arm.runs))]


def _shortened(names: list[str], most: int = 4) -> str:
    """Return ``a, b and c``, or ``a, b, c, d and 9 more`` for a long list."""
    if len(names) <= most:
        return listing(names)
    return listing([*names[:most], f"{len(names) - most} more"])
