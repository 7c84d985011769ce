"""`optbench submit`: submit a run, a comparison, a tuning study or another command as SLURM jobs. Torch-free.

It is not in `harness/jobs`, because comparisons and studies are defined in `analysis`.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

from analysis.compare import arguments, sessions
from harness import command_line
from harness.commands import COMMANDS
from harness.config import cluster
from harness.errors import InputError, closest
from harness.jobs import scripts, slurm, submit
from harness.jobs.grid import GridRow
from harness.jobs.submit import Queued, SubmitRequest
from harness.output import json_document
from harness.record import folder as run_folder
from harness.redaction import redact_argv

_NOT_AS_JOB = ("submit", "status", "list", "show", "doctor", "completion")
_GRIDS = ("train", "compare", "sweep")
"""Commands whose runs are jobs; every other command is one job of its own."""


@dataclass(frozen=True)
class _SubmitArguments:
    command: str
    overrides: list[str]
    cluster_overrides: list[str]
    dry_run: bool
    as_json: bool
    after: tuple[str, ...]
    then: tuple[tuple[str, ...], ...]
    follows: bool


def main(argv: Sequence[str]) -> int:
    """Run ``optbench submit [COMMAND] [its arguments] [cluster=NAME] [cluster.key=value] [--dry-run] [--json]``.

    Without a command: ``train``. ``compare`` becomes an array with one row per run, and a report after it; ``sweep`` an
    array of its trials, and a job after it that queues what follows from their results; every other command one job on
    one node.

    Returns:
        0: queued (or shown, or nothing to do). 1: no trial of a sweep ended with a finite loss. 75: trials of a sweep
        were cancelled or interrupted, so that nothing follows yet.

    Raises:
        InputError: bad input, here or for SLURM; nothing was queued.
    """
    submitted = _parse(argv)
    said: list[str] = []

    def say(text: str) -> None:
        said.append(text)
        print(text, file=sys.stderr, flush=True)

    # Check all of them now: the script of a later job is written after the first job is queued.
    scripts.check_words([argument for command in (argv, *submitted.then) for argument in command])
    request = SubmitRequest(
        cluster=cluster.load(submitted.cluster_overrides),
        command=shlex.join(["optbench", "submit", *redact_argv(argv)]),
        after=submitted.after,
        then=submitted.then,
        dry_run=submitted.dry_run,
        say=say,
    )
    if not submitted.dry_run:
        slurm.require()
    if submitted.command == "train":
        queued = submit.train(submitted.overrides, request)
    elif submitted.command == "compare":
        queued = _compare(submitted.overrides, request)
    elif submitted.command == "sweep":
        from analysis.submit import sweep

        queued = sweep.queue(
            submitted.overrides, submitted.cluster_overrides, request, follows=submitted.follows
        )
        if isinstance(queued, int):
            if submitted.as_json:
                _show_nothing(submitted, said[-1])
            return queued
    else:
        home = Path("runs") / f"{submitted.command}-{datetime.now():%Y%m%d-%H%M%S}"
        queued = submit.command([submitted.command, *submitted.overrides], home, request)
    _show(queued, submitted)
    return 0


def _compare(overrides: Sequence[str], request: SubmitRequest) -> Queued:
    """Check all runs, then queue them in the order of `optbench compare`."""
    plan = arguments.plan(overrides)
    arguments.refuse_concurrency(plan)
    rows: list[GridRow] = []
    done: list[str] = []
    home, overwrite = Path(), False
    for seed in plan.seeds:
        for arm in plan.arms:
            run, kept = submit.prepared(plan.overrides(arm, seed), request, writes_folder=False)
            home, overwrite = run.folder.parent, run.config.overwrite
            if sessions.is_done(run):
                done.append(run.folder.name)
            else:
                run_folder.check(run.folder, run.config, run.identity, run.shorter_runs)
            folder = str(run.folder.absolute())
            rows.append(GridRow(tuple(kept), len(rows), run.folder.name, folder, run.identity))
    request = replace(request, then=(("report", str(home)), *request.then))
    queued = submit.sweep(rows, home, request, done=done, overwrite=overwrite)
    if queued.job is not None:
        sessions.write_provenance(home, plan)
    return queued


def _parse(argv: Sequence[str]) -> _SubmitArguments:
    # Other commands have options of their own.
    arguments = command_line.parse("submit", argv, keeps_unknown=True)
    options, rest = arguments.options, arguments.rest
    command = "train"
    if rest and "=" not in rest[0] and not rest[0].startswith("-"):
        command, *rest = rest
        _check_command(command)
    if options.next and command != "sweep":
        raise InputError(
            "--next", command, "follows the trials of a sweep", fix="optbench submit sweep … --next"
        )
    if command in _GRIDS:
        for argument in rest:
            if argument.startswith("--"):
                raise command_line.unknown_option("submit", argument)
    own, others = cluster.split(rest)
    return _SubmitArguments(
        command,
        overrides=others,
        cluster_overrides=own,
        dry_run=options.dry_run,
        as_json=options.json,
        after=tuple(job for value in options.after for job in _jobs(value)),
        then=tuple(map(_then, options.then)),
        follows=options.next,
    )


def _check_command(name: str) -> None:
    allowed = [name for name in COMMANDS if name not in _NOT_AS_JOB]
    if name not in allowed:
        guess = closest(name, allowed)
        fix = f"optbench submit {guess} …" if guess else "optbench submit compare adamw sumo"
        raise InputError("submit", name, "cannot be a job", allowed=allowed, fix=fix)


def _jobs(value: str) -> list[str]:
    jobs = value.replace(":", ",").split(",")
    if not all(job.isdecimal() for job in jobs):
        raise InputError(
            "--after", value or "nothing", allowed="numbers of jobs, e.g. 12,13", fix="--after 12"
        )
    return jobs


def _then(value: str) -> tuple[str, ...]:
    try:
        command = shlex.split(value)
    except ValueError as error:
        raise InputError(
            "--then", value, f"cannot be split into arguments ({error})", fix="close the quotes"
        ) from None
    if not command:
        raise InputError("--then", value, "names no command", fix="--then 'margin optimizer=gd,adam'")
    _check_command(command[0])
    if command[0] in _GRIDS:
        fix = "submit it by itself, with --after JOB"
        raise InputError("--then", value, "is not a command of one node", fix=fix)
    return tuple(command)


def _show_nothing(submitted: _SubmitArguments, reason: str) -> None:
    print(
        json_document(
            dry_run=submitted.dry_run, job=None, reason=reason, folder=None, rows=[], skipped=[], then=[]
        )
    )


def _show(queued: Queued, submitted: _SubmitArguments) -> None:
    if submitted.as_json:
        facts = {
            "dry_run": submitted.dry_run,
            "job": queued.job,
            "folder": str(queued.folder),
            "script": str(queued.script),
            "text": queued.text,
            "rows": [{"row": row, "name": name} for row, name in sorted(queued.rows.items())],
            "skipped": [{"name": name, "reason": reason} for name, reason in queued.skipped.items()],
            "then": [{"job": job, "script": script} for job, script in queued.then],
        }
        print(json_document(**facts))
        return
    if submitted.dry_run:
        print(queued.text, end="")
        return
    for name, reason in queued.skipped.items():
        print(f"not queued: {name} ({reason})")
    if queued.job is None:
        print("nothing to do")
        print(queued.folder)
        return
    what = f"job {queued.job}"
    if queued.rows:
        what += f": {len(queued.rows)} runs, rows {', '.join(map(str, sorted(queued.rows)))}"
    print(what)
    for job, script in queued.then:
        print(f"job {job} afterwards: {Path(script).stem}")
    print(f"script: {queued.script}")
    print(f"watch:  optbench status {shlex.quote(str(queued.folder))}")
