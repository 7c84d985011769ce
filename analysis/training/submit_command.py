"""``optbench submit …``: a run, a comparison or any other command as SLURM jobs. Torch-free.

Here and not in `harness/jobs`, because a comparison's arms and its report are of this package.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

from analysis.training import arguments, sessions
from harness.commands import COMMANDS
from harness.config import cluster
from harness.config.errors import InputError, closest
from harness.jobs import scripts, slurm, submit
from harness.jobs.grid import Row
from harness.jobs.submit import Queued, Request
from harness.record import folder as run_folder
from harness.record.schema import SCHEMA_VERSION
from harness.redaction import redact_argv

_NOT_AS_JOB = ("submit", "status", "list", "show", "doctor", "completion", "sweep")
_FLAGS = ("--dry-run", "--json", "--after", "--then")


@dataclass(frozen=True)
class _Asked:
    command: str
    words: list[str]
    cluster_words: list[str]
    dry_run: bool
    as_json: bool
    after: tuple[str, ...]
    then: tuple[tuple[str, ...], ...]


def main(argv: Sequence[str]) -> int:
    """``optbench submit [COMMAND] [words of it] [cluster=NAME] [cluster.key=value] [--dry-run] [--json]``.

    Without a command: ``train``. ``compare`` becomes an array with one row per run, and a report after it; every other
    command one job on one node.

    Returns:
        0: queued (or shown, or nothing to do).

    Raises:
        InputError: bad input, here or for SLURM; nothing was queued.
    """
    asked = _read(argv)
    # All of them now: a later job's script is written when the first one is queued already.
    scripts.check_words([word for words in (argv, *asked.then) for word in words])
    request = Request(
        cluster=cluster.load(asked.cluster_words),
        command=shlex.join(["optbench", "submit", *redact_argv(argv)]),
        after=asked.after,
        then=asked.then,
        dry_run=asked.dry_run,
        say=lambda text: print(text, file=sys.stderr, flush=True),
    )
    if not asked.dry_run:
        slurm.require()
    if asked.command == "train":
        queued = submit.train(asked.words, request)
    elif asked.command == "compare":
        queued = _compare(asked.words, request)
    else:
        home = Path("runs") / f"{asked.command}-{datetime.now():%Y%m%d-%H%M%S}"
        queued = submit.command([asked.command, *asked.words], home, request)
    _show(queued, asked)
    return 0


def _compare(words: Sequence[str], request: Request) -> Queued:
    """All runs checked, then queued: seeds outside, arms inside, as `optbench compare` makes them."""
    plan = arguments.plan(words)
    rows: list[Row] = []
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
            rows.append(Row(tuple(kept), len(rows), run.folder.name, folder, run.identity))
    request = replace(request, then=(("report", str(home)), *request.then))
    queued = submit.sweep(rows, home, request, done=done, overwrite=overwrite)
    if queued.job is not None:
        from analysis.report import finish

        finish.leave_origin(home, plan)
    return queued


def _read(argv: Sequence[str]) -> _Asked:
    rest = list(argv)
    command = "train"
    place = next((place for place, word in enumerate(rest) if word not in ("--dry-run", "--json")), None)
    if place is not None and "=" not in rest[place] and not rest[place].startswith("-"):
        command = _command(rest.pop(place))
    words: list[str] = []
    after: list[str] = []
    then: list[tuple[str, ...]] = []
    following = iter(rest)
    for word in following:
        flag, equals, value = word.partition("=")
        if flag in ("--after", "--then"):
            value = value if equals else next(following, "")
            if flag == "--after":
                after += _jobs(value)
            else:
                then.append(_then(value))
        elif word not in _FLAGS:
            # Other commands have flags of their own.
            if word.startswith("--") and command in ("train", "compare"):
                raise InputError("argument", word, "is not known", allowed=_FLAGS)
            words.append(word)
    mine, others = cluster.split(words)
    return _Asked(command, others, mine, "--dry-run" in argv, "--json" in argv, tuple(after), tuple(then))


def _command(word: str) -> str:
    allowed = [name for name in COMMANDS if name not in _NOT_AS_JOB]
    if word == "sweep":
        reason = "chooses its last runs by its first ones, and runs on one machine"
        fix = "optbench sweep … in a job of yours (the same command goes on), then optbench submit compare …"
        raise InputError("submit", word, reason, fix=fix)
    if word not in allowed:
        guess = closest(word, allowed)
        fix = f"optbench submit {guess} …" if guess else "optbench submit compare adamw sumo"
        raise InputError("submit", word, "is no command that can be a job", allowed=allowed, fix=fix)
    return word


def _jobs(value: str) -> list[str]:
    jobs = value.replace(":", ",").split(",")
    if not all(job.isdecimal() for job in jobs):
        raise InputError(
            "--after", value or "nothing", allowed="numbers of jobs, e.g. 12,13", fix="--after 12"
        )
    return jobs


def _then(value: str) -> tuple[str, ...]:
    words = shlex.split(value)
    if not words:
        raise InputError("--then", "nothing", allowed="a command, e.g. 'margin optimizer=gd,adam'")
    if _command(words[0]) in ("train", "compare"):
        fix = "submit it by itself, with --after JOB"
        raise InputError("--then", value, "is no command of one node", fix=fix)
    return tuple(words)


def _show(queued: Queued, asked: _Asked) -> None:
    if asked.as_json:
        facts = {
            "schema_version": SCHEMA_VERSION,
            "dry_run": asked.dry_run,
            "job": queued.job,
            "folder": str(queued.folder),
            "script": str(queued.script),
            "text": queued.text,
            "rows": [{"row": row, "name": name} for row, name in sorted(queued.rows.items())],
            "skipped": [{"name": name, "reason": reason} for name, reason in queued.skipped.items()],
            "then": [{"job": job, "script": script} for job, script in queued.then],
        }
        print(json.dumps(facts, indent=2, ensure_ascii=False))
        return
    if asked.dry_run:
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
