"""``optbench status [DIR] [--watch] [--cancel NAME] [--resubmit NAME] [--json]``. Torch-free."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich import box
from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from harness import command_line
from harness.console import cell, for_tables
from harness.errors import InputError, closest
from harness.jobs import slurm, status
from harness.jobs.status import ACTIVE, JobStatus, RunStatus
from harness.jobs.submission import Submission, add_event
from harness.output import json_document

REFRESH_S = 2.0
NARROWEST = 110
"""Width of the table where the output is not a terminal."""
_LONGEST = 300
"""Characters of a reason in the table; --json has all of it."""
_COLOURS = {
    "finished": "green",
    "running": "cyan",
    "failed": "red",
    "diverged": "red",
    "dead": "red",
    "unreadable": "red",
}
_COLOURS |= {"stopped": "red", "cancelled": "yellow", "interrupted": "yellow", "requeued": "yellow"}


def main(argv: Sequence[str]) -> int:
    """Show the state of the runs below DIR (default ``runs``), and cancel or resubmit some of them.

    Raises:
        InputError: no such folder or run, or a run that cannot be cancelled or resubmitted.
    """
    arguments = command_line.parse("status", argv)
    options, root = arguments.options, _folder(arguments.rest)
    runs, jobs = status.collect(root)
    for name in options.cancel:
        print(_cancel(_named(name, runs, "--cancel")), file=sys.stderr)
    for name in options.resubmit:
        print(_resubmit(_named(name, runs, "--resubmit")), file=sys.stderr)
    if options.cancel or options.resubmit:
        runs, jobs = status.collect(root)
    if options.json:
        print(json_document(**_document(runs, jobs)))
        return 0
    console = for_tables(width=NARROWEST)
    if not options.watch:
        console.print(_shown(runs, jobs, root))
        return 0
    with Live(_shown(runs, jobs, root), console=console, auto_refresh=False) as live:
        while any(run.state in ACTIVE for run in runs) or any(job.is_active for job in jobs):
            time.sleep(REFRESH_S)
            runs, jobs = status.collect(root)
            live.update(_shown(runs, jobs, root), refresh=True)
    return 0


def _folder(names: Sequence[str]) -> Path:
    if len(names) > 1:
        raise InputError("status", " ".join(names), "is not one folder", fix=f"optbench status {names[0]}")
    root = Path(names[0] if names else "runs")
    if not root.is_dir():
        raise InputError("status", root, "is not a folder", fix="optbench status runs")
    return root


def _named(name: str, runs: Sequence[RunStatus], flag: str) -> RunStatus:
    """Return the run of a name: ``group/name``, ``name`` if that is unique, or the number of its job."""
    matches = [run for run in runs if name in (run.name, run.folder.name, run.job)]
    if len(matches) == 1:
        return matches[0]
    names = [run.name for run in runs]
    if not matches:
        guess = closest(name, [*names, *(run.folder.name for run in runs)])
        fix = f"{flag} {guess}" if guess else None
        raise InputError(flag, name, "is not a run here", allowed=names, suggestion=guess, fix=fix)
    several = [run.name for run in matches]
    raise InputError(flag, name, "matches several runs", allowed=several, fix=f"{flag} {several[0]}")


def _cancel(run: RunStatus) -> str:
    if run.job is None or run.state not in ACTIVE:
        reason = f"is {run.state}: there is no job to cancel"
        raise InputError("--cancel", run.name, reason, fix="leave it out")
    slurm.cancel(run.job)
    if run.state in ("pending", "requeued"):
        # No script runs that could note it.
        add_event(run.folder, run.job, 0, "cancelled", "while it waited")
    return f"cancelled: {run.name} (job {run.job})"


def _resubmit(run: RunStatus) -> str:
    if run.state in (*ACTIVE, "finished"):
        reason = f"is {run.state}: there is nothing to do" if run.state == "finished" else f"is {run.state}"
        raise InputError("--resubmit", run.name, reason, fix="leave it out")
    found = status.submitted_as(run)
    if found is None:
        reason = "was not submitted by optbench submit, so there is no script"
        raise InputError("--resubmit", run.name, reason, fix="optbench submit KEY=VALUE …")
    entry, row = found
    slurm.require()
    script = Path(entry.script)
    if not script.is_file():
        raise InputError(
            "--resubmit", run.name, f"was submitted by {script}, which is gone", fix="optbench submit …"
        )
    job = slurm.submit(script, *([] if row is None else [f"--array={row}"]))
    home = run.folder if row is None else run.folder.parent
    Submission(home).add(job, entry.kind, script, () if row is None else (row,))
    return f"submitted: {run.name} (job {job if row is None else f'{job}_{row}'})"


def _document(runs: Sequence[RunStatus], jobs: Sequence[JobStatus]) -> dict[str, object]:
    shown = [{**asdict(run), "folder": str(run.folder)} for run in runs]
    return {"runs": shown, "jobs": [asdict(job) for job in jobs]}


def _shown(runs: Sequence[RunStatus], jobs: Sequence[JobStatus], root: Path) -> Group:
    if not runs and not jobs:
        return Group(cell(f"no runs below {root}"))
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    numbers = ("step", "train loss", "val loss", "tokens/s", "restarts")
    for column in ("run", "state", *numbers, "job", "reason"):
        table.add_column(column, justify="right" if column in numbers else "left", overflow="fold")
    for run in runs:
        table.add_row(
            cell(run.name),
            cell(run.state, _COLOURS.get(run.state, "")),
            "" if run.step is None else f"{run.step}/{'?' if run.steps is None else run.steps}",
            "" if run.loss is None else f"{run.loss:.4f}",
            "" if run.val_loss is None else f"{run.val_loss:.4f}",
            "" if run.tokens_per_s is None else f"{run.tokens_per_s:,.0f}",
            str(run.restarts or ""),
            cell((run.job or "") + (f" {run.nodes}" if run.nodes else "")),
            cell(_reason(run)),
        )
    parts: list[Table | Text] = [table] if runs else []
    parts += [cell(f"job {job.job}: {job.command}: {job.state} {job.reason}".rstrip()) for job in jobs]
    return Group(*parts)


def _reason(run: RunStatus) -> str:
    """Return why the run is in its state, and the first file of its folder that cannot be read."""
    more = [problem for problem in run.problems if problem != run.reason]
    text = "; ".join([run.reason, *more[:1]] if run.reason else more[:1])
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"
