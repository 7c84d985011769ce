"""Collect the state of runs below a folder, from their run folders and from SLURM. Torch-free.

SLURM knows jobs, not runs, and forgets a job some minutes after its end; the run folders hold the rest.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from harness.errors import InputError
from harness.jobs import grid, leases, slurm
from harness.jobs.grid import GridRow
from harness.jobs.slurm import ArrayTask
from harness.jobs.submission import Event, Submission, Submitted, read_events
from harness.process.heartbeat import BEAT_S
from harness.record import readers
from harness.record.folder import JOBS
from harness.record.readers import METRICS, STATUS, Status, heartbeats
from harness.record.schema import STATES

ACTIVE = ("pending", "requeued", "starting", "running", "stopping")
"""States of a run that waits or runs."""
FRESH_S = 15.0
"""Age, s, of a heartbeat beyond which its process is dead or its file system is late."""
UNREADABLE = "unreadable"


@dataclass(frozen=True)
class RunStatus:
    """One run.

    Attributes:
        name: of the run, with its group.
        folder: of the run.
        state: pending (in SLURM's queue), requeued (in it again), starting, running, stopping, finished, interrupted,
            cancelled, stopped (not queued again: no progress, or too often), failed, diverged, dead (its processes
            are gone and could not say so) or unreadable (reason says why).
        step, steps: done, and in all; None where it is not known yet.
        loss: last training loss, nats per token.
        val_loss: last validation loss, nats per token.
        tokens_per_s: last throughput.
        restarts: attempts after the first.
        reason: one line; "" if there is none.
        job: that trains it or trained it last; None without SLURM.
        nodes: that it runs on.
        problems: one line for each file of its folder that cannot be read.
    """

    name: str
    folder: Path
    state: str
    step: int | None
    steps: int | None
    loss: float | None
    val_loss: float | None
    tokens_per_s: float | None
    restarts: int
    reason: str
    job: str | None
    nodes: str
    problems: list[str]


@dataclass(frozen=True)
class JobStatus:
    """A job that trains nothing: a report, a companion job.

    Attributes:
        job: its number.
        command: that it runs.
        state: SLURM's state in lower case; ended: SLURM no longer knows the job.
        reason: SLURM's; "" if there is none.
        script: its file.
    """

    job: str
    command: str
    state: str
    reason: str
    script: str

    @property
    def is_active(self) -> bool:
        """Return True if the job waits or runs."""
        return self.state.upper() in slurm.ALIVE


@dataclass
class _Found:
    """A run folder with the submitted jobs that concern it."""

    folder: Path
    submitted: list[tuple[str, Submitted]]
    """(job or row of an array, its entry), oldest first."""

    @property
    def job(self) -> str | None:
        """Return the newest job that trains or trained the run; None if there is none."""
        lease = leases.holder(leases.path_of(self.folder))
        jobs = [task for task, _ in self.submitted] + [event.job for event in read_events(self.folder)]
        jobs += [lease.job] if lease is not None and slurm.is_job(lease.job) else []
        return max(jobs, key=lambda job: int(job.partition("_")[0])) if jobs else None


def collect(root: Path) -> tuple[list[RunStatus], list[JobStatus]]:
    """Return all runs below ``root`` (or ``root`` itself), by path, and the other jobs that were submitted there.

    A folder or file that cannot be read is reported as a run in the state ``unreadable``.
    """
    found: dict[Path, _Found] = {}
    others: list[Submitted] = []
    unreadable: list[RunStatus] = []
    for folder in _homes(root, unreadable):
        submission = Submission(folder)
        try:
            rows = {row.row: row for row in grid_rows(submission)}
        except InputError as error:
            rows = {}
            unreadable.append(_unreadable(submission.path / grid.FILE, f"{error.value} {error.reason}"))
        if os.path.lexists(folder / STATUS):
            found.setdefault(folder.absolute(), _Found(folder, []))
        for entry in submission.jobs():
            if entry.kind == "train":
                found.setdefault(folder.absolute(), _Found(folder, [])).submitted.append((entry.job, entry))
            elif entry.kind == "sweep":
                for number in entry.rows:
                    place = _place(rows[number], folder) if number in rows else None
                    if place is not None:
                        found.setdefault(place.absolute(), _Found(place, [])).submitted.append(
                            (entry.task(number), entry)
                        )
            else:
                others.append(entry)
    jobs = [job for run in found.values() if (job := run.job) is not None]
    tasks = slurm.tasks([*jobs, *(entry.job for entry in others)])
    runs = [_status(run, tasks) for _, run in sorted(found.items())]
    runs = sorted([*runs, *unreadable], key=lambda run: run.folder.absolute())
    return runs, [_other(entry, tasks.get(entry.job)) for entry in others]


def _unreadable(path: Path, reason: str) -> RunStatus:
    """Return the entry of a folder or file that cannot be read."""
    return RunStatus(
        _name(path), path, UNREADABLE, None, None, None, None, None, 0, reason, None, "", [reason]
    )


def _name(folder: Path) -> str:
    place = folder.absolute()
    return f"{place.parent.name}/{place.name}"


def grid_rows(submission: Submission) -> list[GridRow]:
    """Return the rows of a group's grid; none if there is no grid."""
    return grid.read(submission.path / grid.FILE)


def submitted_as(run: RunStatus) -> tuple[Submitted, int | None] | None:
    """Return the last entry that submitted a run, and its row in that grid; None if `optbench submit` did not."""
    own = [entry for entry in Submission(run.folder).jobs() if entry.kind == "train"]
    if own:
        return own[-1], None
    group = Submission(run.folder.parent)
    for row in grid_rows(group):
        if Path(row.folder).name == run.folder.name:
            entries = [entry for entry in group.jobs() if entry.kind == "sweep" and row.row in entry.rows]
            return (entries[-1], row.row) if entries else None
    return None


def _place(row: GridRow, group: Path) -> Path | None:
    """Return a row's folder, also after the group's folder was moved; None if the row names none."""
    name = Path(row.folder).name
    return None if name in ("", "..") or "\0" in name else group / name


def _homes(root: Path, unreadable: list[RunStatus]) -> Iterator[Path]:
    """Yield folders of runs and of groups with jobs, and add those that cannot be listed to ``unreadable``."""

    def note(error: OSError) -> None:
        unreadable.append(_unreadable(Path(error.filename), f"can't be listed ({error.strerror})"))

    for directory, below, files in os.walk(root, onerror=note):
        folder = Path(directory)
        is_run = STATUS in files or STATUS in below
        if is_run or JOBS in below:
            yield folder
        below[:] = sorted(name for name in below if not is_run and not name.startswith(".") and name != JOBS)


def _status(run: _Found, tasks: dict[str, ArrayTask]) -> RunStatus:
    content, problems = readers.status(run.folder)
    events = read_events(run.folder)
    job = run.job
    task = tasks.get(job) if job is not None else None
    event = next((event for event in reversed(events) if event.job == job), None)
    if content is not None and content.state not in STATES:
        problems = [
            *problems,
            f"{STATUS} holds {f'the unknown state {content.state}' if content.state else 'no state'}",
        ]
        content = content.model_copy(update={"state": ""})
    is_over = task is None or task.is_over
    if problems and is_over and (content is None or not content.state) and not (run.folder / "DONE").exists():
        state, reason = UNREADABLE, problems[-1]
    else:
        state, reason = _state(run.folder, content or Status(), job, task, event)
    row: dict[str, float | int | None] = {}
    for values in readers.last_rows(run.folder / METRICS):
        row |= {key: value for key, value in values.items() if value is not None}
    beats = heartbeats(run.folder)[0] if state in ("running", "stopping") else {}
    content = content or Status()
    steps = [beat.step for beat in beats.values()] + ([] if content.step is None else [content.step])
    return RunStatus(
        name=_name(run.folder),
        folder=run.folder,
        state=state,
        step=max(steps) if content.step is not None else None,
        steps=content.steps,
        loss=row.get("train/loss"),
        val_loss=row.get("val/loss"),
        tokens_per_s=row.get("throughput/tokens_per_s"),
        restarts=max(0, len(content.attempts) - 1),
        reason=reason,
        job=job,
        nodes=task.nodes if task is not None and not task.is_over else "",
        problems=problems,
    )


def _state(
    folder: Path,
    content: Status,
    job: str | None,
    task: ArrayTask | None,
    event: Event | None,
) -> tuple[str, str]:
    reason = content.attempts[-1].reason if content.attempts else ""
    own = content.state
    if (folder / "DONE").exists():
        return "finished", reason
    if task is not None and not task.is_over:
        if task.state == "COMPLETING":
            return "stopping", event.text if event is not None else ""
        if task.state == "RUNNING":
            has_begun = event is not None and _is_alive(folder, event.time)
            return ("running", "") if has_begun else ("starting", f"job {job} on {task.nodes}")
        again = task.restarts > 0 or (event is not None and event.kind in ("requeued", "preempted"))
        waits = f"waits: {task.reason}" if task.reason else "waits"
        return "requeued" if again else "pending", f"{event.text}; {waits}" if again and event else waits
    if (task is not None and task.state == "CANCELLED") or (event is not None and event.kind == "cancelled"):
        return "cancelled", f"job {job}" + (f", {event.text}" if event is not None else "")
    if event is not None and event.kind in ("stopped", "failed", "preflight", "waiting"):
        named = "stopped" if event.kind in ("stopped", "waiting") else "failed"
        return (own, reason) if own in ("failed", "diverged") else (named, event.text)
    if event is not None and event.kind == "resubmitted":
        return "requeued", f"as job {event.text}"
    if own == "running":
        if _is_alive(folder):
            return "running", ""
        ended = f"; SLURM: {task.state} {task.reason}".rstrip() if task is not None else ""
        return "dead", f"{_silence(folder)}{ended}"
    if own:
        return own, reason
    ended = f"{task.state} {task.reason}".strip() if task is not None else "no longer known to SLURM"
    return "failed", f"job {job} left no run: {ended}"


def _is_alive(folder: Path, since: str | None = None) -> bool:
    """Return True if a process wrote a heartbeat just now, and after the attempt began at ``since`` (ISO 8601)."""
    oldest_s = FRESH_S
    if since is not None:
        began = datetime.fromisoformat(since)
        began = began if began.tzinfo is not None else began.replace(tzinfo=UTC)
        oldest_s = min(oldest_s, (datetime.now(UTC) - began).total_seconds())
    return any(beat.age_s < oldest_s for beat in heartbeats(folder)[0].values())


def _silence(folder: Path) -> str:
    beats = heartbeats(folder)[0].values()
    if not beats:
        return "its processes are gone"
    last = min(beats, key=lambda beat: beat.age_s)
    return f"no sign of life for {last.age_s - BEAT_S:.0f} s, since step {last.step} ({last.where})"


def _other(entry: Submitted, task: ArrayTask | None) -> JobStatus:
    state = task.state.lower() if task is not None else "ended"
    reason = task.reason if task is not None else "no longer known to SLURM"
    return JobStatus(entry.job, entry.kind, state, reason, entry.script)
