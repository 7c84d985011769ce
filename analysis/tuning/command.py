"""The command ``optbench sweep``: words in, exit code and files out."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from analysis.training import sessions
from analysis.tuning import arguments
from harness.files import atomic
from harness.output import json_document

if TYPE_CHECKING:
    from analysis.tuning.running import Tuning


def main(argv: Sequence[str]) -> int:
    """``optbench sweep OPTIMIZER … [trials=N] [seeds=3] [space] [key=value …]``: tune alike, then compare.

    Every optimizer gets the same number of trials with the same seed, data, budget and schedule; the best setting of
    each is then run on fresh seeds, and only those runs are compared.

    Returns:
        0 done · 1 no trial of an optimizer ended with a finite loss · 3 a run failed, or a run of the comparison
        diverged · 75 interrupted (call again to go on).

    Raises:
        InputError: bad input of any trial; nothing was started.
    """
    study = arguments.read(argv)
    from analysis.tuning import running

    with sessions.Trainer(as_json=study.plan.as_json, verbosity=study.plan.verbosity) as trainer:
        tuning = running.Tuning(study, trainer)
        if study.dry_run:
            return _dry_run(study, tuning)
        with sessions.holding(tuning.home):
            code = _train(tuning)
            return _conclude(study, tuning, code)


def _train(tuning: Tuning) -> int:
    """Make the trials, then the runs of the comparison; returns the exit code."""
    from analysis.report import finish
    from analysis.tuning import running

    if tuning.tune() == running.INTERRUPTED:
        return running.INTERRUPTED
    code = tuning.code()
    if all(arm.best is None for arm in tuning.arms()):
        return code
    ended, made = tuning.confirm()
    finish.leave_origin(tuning.home, made)
    # A trial that failed stays said; of all else the comparison is what the command was for.
    return ended if ended == running.INTERRUPTED else max(code, ended)


def _conclude(study: arguments.Study, tuning: Tuning, code: int) -> int:
    """Tables of the trials, then the report of the comparison, as far as there is one."""
    from analysis.compare import renderings
    from analysis.report import finish, tuning_tables

    tuning.write()
    arms = tuning.arms()
    path = tuning.home / "tuning.md"
    atomic.write_text(path, tuning_tables.markdown(arms))
    if not study.plan.as_json:
        renderings.print_grid(tuning_tables.overview(arms), sys.stdout)
        print(path)
    finish.write(tuning.home, tuning.home, as_json=study.plan.as_json, extra={"tuning": tuning.document()})
    return code


def _dry_run(study: arguments.Study, tuning: Tuning) -> int:
    """Print the trials and what they cost; nothing is started."""
    from analysis import formatting
    from analysis.compare import renderings
    from analysis.report import tuning_tables

    arms = tuning.arms()
    config = tuning.plans[0].run.config
    made = [t for arm in arms for t in arm.trials if t.state == "finished" and t.seconds > 0]
    per_run = sum(t.seconds for t in made) / len(made) if made else None
    fresh = len(arms) * len(study.plan.seeds)
    runs = {"trials": len(tuning.plans), "at_most_added": study.extend * len(arms), "fresh": fresh}
    tokens = config.steps * config.batch_size * config.seq_len
    cost = {"runs": runs, "steps_per_run": config.steps, "tokens_per_run": tokens, "seconds_per_run": per_run}
    if study.plan.as_json:
        print(json_document(dry_run=True, tuning=tuning.document(), cost=cost))
        return 0
    renderings.print_grid(tuning_tables.listing(arms), sys.stdout)
    total = runs["trials"] + fresh
    seeds = formatting.listing([str(seed) for seed in study.plan.seeds])
    added = f", and up to {runs['at_most_added']} trials more" if study.extend else ""
    print(f"{runs['trials']} trials (seed {study.seed}) and {fresh} runs on fresh seeds {seeds}{added}")
    each, all_tokens = formatting.count(tokens), formatting.count(total * tokens)
    print(f"{total} runs of {config.steps} steps, {each} tokens each: {all_tokens} tokens")
    if per_run is not None:
        time, whole = formatting.seconds(per_run), formatting.seconds(per_run * total)
        print(f"at {time} a run, the mean of {len(made)} that are finished: {whole} in all")
    return 0
