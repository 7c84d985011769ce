"""`optbench sweep`: tune several optimizers with equal budgets, then compare them on fresh seeds."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from analysis import formatting
from analysis.compare import sessions
from analysis.tuning import arguments
from harness.errors import ExitCode
from harness.files import atomic
from harness.output import json_document

if TYPE_CHECKING:
    from analysis.tuning.study import Tuning


def main(argv: Sequence[str]) -> int:
    """Run ``optbench sweep OPTIMIZER … [trials=N] [seeds=3] [space] [key=value …]``.

    Every optimizer gets the same number of trials with the same seed, data, budget and schedule; the best setting of
    each is then run on fresh seeds, and only those runs are compared.

    Returns:
        0: done. 1: no trial of an optimizer ended with a finite loss. 3: a run failed, or a run of the comparison
        diverged. 75: interrupted (call again to continue).

    Raises:
        InputError: bad input of any trial; nothing was started.
    """
    study = arguments.read(argv)
    # Arguments are checked before the imports that take long.
    from analysis.tuning.study import Tuning

    trainer = sessions.Trainer(
        as_json=study.plan.as_json, verbosity=study.plan.verbosity, concurrency=study.plan.concurrency
    )
    tuning = Tuning(study, trainer)
    if study.dry_run:
        _print_plan(study, tuning)
        return 0
    with sessions.lock_group(tuning.home):
        code = _train(tuning)
        _report(study, tuning)
        return code


def _train(tuning: Tuning) -> int:
    """Run the trials, then the comparison; return the exit code."""
    if tuning.tune() == ExitCode.RESUMABLE:
        return ExitCode.RESUMABLE
    trials_code = tuning.exit_code()
    if all(arm.best is None for arm in tuning.arms()):
        return trials_code
    code, plan = tuning.confirm()
    sessions.write_provenance(tuning.home, plan)
    # A failed trial stays visible in the exit code, also where all runs of the comparison finished.
    return code if code == ExitCode.RESUMABLE else max(trials_code, code)


def _report(study: arguments.Study, tuning: Tuning) -> None:
    """Write the tables of the trials, then the report of the comparison as far as there is one."""
    from analysis import text_tables
    from analysis.report import report
    from analysis.report import tuning as tuning_report

    tuning.write_ledger()
    arms = tuning.arms()
    path = tuning.home / "tuning.md"
    atomic.write_text(path, tuning_report.markdown(arms))
    if not study.plan.as_json:
        text_tables.print_table(tuning_report.overview(arms), sys.stdout)
        print(path)
    report.finish(tuning.home, tuning.home, as_json=study.plan.as_json, extra={"tuning": tuning.ledger()})


def _print_plan(study: arguments.Study, tuning: Tuning) -> None:
    """Print the trials and their cost; nothing is started."""
    from analysis import text_tables
    from analysis.report import tuning as tuning_report

    arms = tuning.arms()
    config = tuning.trials[0].run.config
    finished = [t for arm in arms for t in arm.trials if t.state == "finished" and t.seconds > 0]
    per_run = sum(t.seconds for t in finished) / len(finished) if finished else None
    fresh = len(arms) * len(study.plan.seeds)
    runs = {"trials": len(tuning.trials), "at_most_added": study.extend * len(arms), "fresh": fresh}
    tokens = config.steps * config.batch_size * config.seq_len
    cost = {"runs": runs, "steps_per_run": config.steps, "tokens_per_run": tokens, "seconds_per_run": per_run}
    if study.plan.as_json:
        print(json_document(dry_run=True, tuning=tuning.ledger(), cost=cost))
        return
    text_tables.print_table(tuning_report.trial_table(arms), sys.stdout)
    total = runs["trials"] + fresh
    seeds = formatting.listing([str(seed) for seed in study.plan.seeds])
    added = f", and up to {formatting.plural(runs['at_most_added'], 'more trial')}" if study.extend else ""
    print(f"{runs['trials']} trials (seed {study.seed}) and {fresh} runs on fresh seeds {seeds}{added}")
    each, all_tokens = formatting.count(tokens), formatting.count(total * tokens)
    print(f"{total} runs of {config.steps} steps, {each} tokens each: {all_tokens} tokens")
    if per_run is not None:
        time, all_time = formatting.seconds(per_run), formatting.seconds(per_run * total)
        print(f"{time} per run, the mean of {len(finished)} finished runs: {all_time} in total")
