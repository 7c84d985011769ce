"""Queue a tuning study on SLURM: the trials as an array, and a job after them that queues what follows.

What follows depends on the results: one more trial for every optimizer while a best one is on an edge, again as an
array, and then the best settings on fresh seeds, with the report after them. The job calls
``optbench submit sweep … --next``, which decides by the run folders, so that a user can call it too. Torch-free.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

from analysis.compare import sessions
from analysis.compare.arguments import refuse_concurrency
from analysis.compare.progress import Verbosity
from analysis.formatting import count, listing, plural
from analysis.report import tuning as tuning_report
from analysis.tuning import arguments
from analysis.tuning.arguments import Study
from analysis.tuning.study import NOTHING_FINITE, PlannedTrial, Tuning
from harness.errors import ExitCode, InputError
from harness.files import atomic
from harness.jobs import submit
from harness.jobs.grid import GridRow
from harness.jobs.submit import Queued, SubmitRequest
from harness.preparation import Prepared
from harness.record import folder as run_folder

__all__ = ["queue"]

LOCK_WAIT_S = 900.0
"""How long the job after the trials waits for another command on its group: nobody would start it again."""
FINAL = ("finished", "diverged", "failed")
"""States of trials that a job after them does not wait for: a failed one would fail again."""


def queue(
    words: Sequence[str], cluster_words: Sequence[str], request: SubmitRequest, *, follows: bool
) -> Queued | ExitCode | int:
    """Queue the next jobs of a study.

    The words of a study file are taken now: editing the file later does not change what is queued.

    Args:
        words: of `optbench sweep`.
        cluster_words: ``cluster…`` overrides, for the job after the trials.
        request: the cluster, and what comes before and after.
        follows: the trials have ended; those that failed are not queued again.

    Returns:
        The queued jobs; or the exit code where nothing was queued: 1, no trial of any optimizer ended with a finite
        loss; 75, with ``follows``: trials were cancelled, interrupted or never started.

    Raises:
        InputError: bad input of any trial, or a folder of another run.
    """
    words = arguments.expanded(words)
    study = arguments.read(words)
    refuse_concurrency(study.plan)
    kept: dict[Path, list[str]] = {}

    def make(overrides: Sequence[str]) -> Prepared:
        run, own = submit.prepared(overrides, request, writes_folder=False)
        kept[run.folder] = own
        return run

    # Standard output is for what was queued.
    trainer = sessions.Trainer(as_json=True, verbosity=Verbosity.NORMAL)
    tuning = Tuning(study, trainer, make)
    patience = LOCK_WAIT_S if follows else 0
    with nullcontext() if request.dry_run else sessions.lock_group(tuning.home, patience):
        # Another command may have changed this group while this one waited.
        tuning.read_ledger()
        overwrites = tuning.trials[0].run.config.overwrite and not request.dry_run
        if overwrites:
            _check_idle(tuning, study)
        pinned = [*_pinned(words, tuning), *cluster_words]
        again = shlex.join(["optbench", "submit", "sweep", *pinned, *_spelled(request.then)])
        trials = _open_trials(tuning, study, request, follows=follows, again=again)
        if trials is None:
            return ExitCode.RESUMABLE
        if trials:
            _say_cost(tuning, study, request)
            after = ("submit", "sweep", *pinned, "--next", *_spelled(request.then))
            one = replace(request, then=(after,))
            queued = _queue([trial.run for trial in trials], kept, tuning.trials_home, one)
            if not request.dry_run:
                tuning.make_folders()
                if overwrites and queued.job is not None:
                    tuning.archive_confirmation()
                tuning.write_ledger()
            return queued
        return _confirm(tuning, kept, request)


def _check_idle(tuning: Tuning, study: Study) -> None:
    """Refuse to overwrite a study whose best settings are being trained.

    Raises:
        InputError: they wait or run.
    """
    names = {f"{arm.label}-seed{seed}" for arm in study.plan.arms for seed in study.plan.seeds}
    busy = sorted(names & submit.busy_runs(tuning.home).keys())
    if busy:
        reason = f"would replace runs that wait or run ({listing(busy)})"
        raise InputError("overwrite", "true", reason, fix=f"optbench status {tuning.home} --cancel {busy[0]}")


def _open_trials(
    tuning: Tuning, study: Study, request: SubmitRequest, *, follows: bool, again: str
) -> list[PlannedTrial] | None:
    """Return the trials to queue: of the first round that has some, with all of the round; none if all have ended.

    Returns:
        None with ``follows`` if trials have no result although nothing trains them; how to go on is said.
    """
    # The group may hold trials of other studies, which are none of this one's business.
    own = re.compile(f"({'|'.join(re.escape(arm.label) for arm in study.plan.arms)})-trial[0-9]+")
    found = {} if request.dry_run else submit.busy_runs(tuning.trials_home, must_know=follows)
    busy = {name: job for name, job in found.items() if own.fullmatch(name)}
    known = submit.submitted_runs(tuning.trials_home) if follows else set()
    members = list(tuning.trials)
    for extension in range(study.extend + 1):
        if extension:
            members = [] if request.dry_run else tuning.extend()
        if not members:
            break
        # While the trials of a round wait or run, there are no results to go on with.
        if busy:
            return members
        submitted = [t.run for t in members if (t.run.folder.name, t.run.identity) in known]
        lost = [run.folder.name for run in submitted if sessions.state_of(run) not in FINAL]
        if lost:
            request.say(
                f"{plural(len(lost), 'trial')} without a result (cancelled, interrupted or never started): "
                f"{listing(lost)}. Nothing is compared. This continues: {again}"
            )
            return None
        new = [t.run for t in members if t.run not in submitted]
        if any(not sessions.has_ended(run) for run in new):
            return members
    return []


def _confirm(tuning: Tuning, kept: dict[Path, list[str]], request: SubmitRequest) -> Queued | int:
    """Queue the best settings on fresh seeds."""
    arms = tuning.arms()
    lost = [arm.label for arm in arms if arm.best is None]
    failed = [
        f"{arm.label} trial {trial.number}" for arm in arms for trial in arm.trials if trial not in arm.spent
    ]
    if failed:
        request.say(f"warning: no result of {', '.join(failed)}: the tuning budgets are unequal")
    if not request.dry_run:
        tuning.make_folders()
        tuning.write_ledger()
        atomic.write_text(tuning.home / "tuning.md", tuning_report.markdown(arms))
    if len(lost) == len(arms):
        request.say("no trial of any optimizer ended with a finite loss: nothing to compare")
        return NOTHING_FINITE
    if lost:
        request.say(f"warning: no trial of {', '.join(lost)} ended with a finite loss: not compared")
    plan, runs = tuning.plan_confirmation(writes=False)
    if not request.dry_run:
        # First, because what waits or runs must neither be archived nor leave the ledger.
        submit.check_rows(_rows(runs, kept), tuning.home)
        tuning.record_confirmation(plan, runs)
    then = (("report", str(tuning.home)), *request.then)
    queued = _queue(runs, kept, tuning.home, replace(request, then=then))
    if queued.job is not None:
        sessions.write_provenance(tuning.home, plan)
    return queued


def _queue(
    runs: Sequence[Prepared], kept: dict[Path, list[str]], home: Path, request: SubmitRequest
) -> Queued:
    done: list[str] = []
    for run in runs:
        if sessions.has_ended(run):
            done.append(run.folder.name)
        else:
            run_folder.check(run.folder, run.config, run.identity, run.shorter_runs)
    return submit.sweep(_rows(runs, kept), home, request, done=done, overwrite=runs[0].config.overwrite)


def _rows(runs: Sequence[Prepared], kept: dict[Path, list[str]]) -> list[GridRow]:
    return [
        GridRow(tuple(kept[run.folder]), row, run.folder.name, str(run.folder.absolute()), run.identity)
        for row, run in enumerate(runs)
    ]


def _say_cost(tuning: Tuning, study: Study, request: SubmitRequest) -> None:
    config = tuning.trials[0].run.config
    fresh = len(study.plan.arms) * len(study.plan.seeds)
    added = f", at most {plural(study.extend * len(study.plan.arms), 'more trial')}" if study.extend else ""
    tokens = config.steps * config.batch_size * config.seq_len
    runs = len(tuning.trials) + fresh
    request.say(
        f"{len(tuning.trials)} trials{added}, then {plural(fresh, 'run')} on fresh seeds: "
        f"{count(runs * tokens)} tokens in {runs} runs of {config.steps} steps"
    )


def _pinned(words: Sequence[str], tuning: Tuning) -> list[str]:
    """Return the words for the job after the trials, which must find these very runs, on whichever node it is."""
    config = tuning.trials[0].run.config
    kept = [w for w in words if w.lstrip("+").partition("=")[0] not in ("overwrite", "precision", "group")]
    pinned = [f"group={tuning.home.name}", f"precision={config.precision}"]
    # What is to be overwritten is archived when it is queued; a second time it would be the results.
    return [*kept, *pinned, "overwrite=false"]


def _spelled(then: Sequence[Sequence[str]]) -> list[str]:
    """Return the options that repeat ``then``."""
    return [word for command in then for word in ("--then", shlex.join(command))]
