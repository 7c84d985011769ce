"""Submit runs and commands as SLURM jobs: check here, render a script, let SLURM test it, then queue it. Torch-free."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from harness.config.cluster import ClusterConfig
from harness.errors import InputError
from harness.files import atomic
from harness.jobs import grid, leases, scripts, slurm
from harness.jobs.folder import check_attempts
from harness.jobs.grid import GridRow
from harness.jobs.scripts import Job, Kind
from harness.jobs.submission import DEPENDENTS, SUCCESSORS, Submission, writing
from harness.preparation import Prepared, prepare
from harness.record import folder as run_folder
from harness.redaction import redact_argv

Say = Callable[[str], None]


@dataclass(frozen=True)
class SubmitRequest:
    """What `optbench submit` was asked for, besides the overrides of the run.

    Attributes:
        cluster: resources and options of the cluster.
        command: the command line, for the head of the script.
        after: numbers of jobs that must end first.
        then: commands (lists of arguments) to run as jobs afterwards, however this one ends.
        dry_run: render the script only.
        say: receives messages.
    """

    cluster: ClusterConfig
    command: str
    after: tuple[str, ...] = ()
    then: tuple[tuple[str, ...], ...] = ()
    dry_run: bool = False
    say: Say = print


@dataclass
class Queued:
    """A request after it was queued.

    Attributes:
        folder: folder of the run, the group or the command's jobs.
        script: file of the first job; it exists unless this was a dry run.
        text: content of the script.
        job: number of the job; None: dry run, or nothing to do.
        rows: row of the grid → name of the run that was queued.
        skipped: name of a run → why it was not queued.
        then: (job, script) of each job that waits for this one.
    """

    folder: Path
    script: Path
    text: str
    job: str | None = None
    rows: dict[int, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    then: list[tuple[str, str]] = field(default_factory=list)


def prepared(
    words: Sequence[str], request: SubmitRequest, *, writes_folder: bool = True
) -> tuple[Prepared, list[str]]:
    """Check one run as the cluster will run it, and return it with the overrides that the job gets.

    These overrides contain the run's name, so that every attempt finds the same folder, and no world_size, which the
    script sets.

    Args:
        words: overrides of the run.
        request: the request.
        writes_folder: refuse a folder that belongs to another run, or to a finished one.

    Raises:
        InputError: bad input; nothing was written but the corpus cache.
    """
    scripts.check_words(words)
    world_size = request.cluster.world_size
    sizes = [word for word in words if word.partition("=")[0] == "world_size"]
    words = [word for word in words if word not in sizes]
    for word in sizes:
        _check_world_size(word.partition("=")[2], request.cluster)
    run = prepare(
        [*words, f"world_size={world_size}"],
        say=request.say,
        writes_folder=writes_folder,
        devices=request.cluster.gpus,
    )
    check_attempts(run.config, may_overwrite=True)
    kept = [word for word in words if word.lstrip("+").partition("=")[0] != "overwrite"]
    # Every attempt trains as was checked here, also where one lands on another kind of GPU.
    kept = [word for word in kept if word != "precision=auto"]
    if not any(word.partition("=")[0] == "precision" for word in kept):
        kept.append(f"precision={run.config.precision}")
    # A configuration file may set it: once is enough, and the job must not repeat it at every attempt.
    if run.config.overwrite:
        kept.append("overwrite=false")
    if run.config.name is None:
        kept.append(f"name={run.folder.name}")
    return run, kept


def train(words: Sequence[str], request: SubmitRequest) -> Queued:
    """Queue one run.

    Raises:
        InputError: bad input, SLURM refuses the script, or a job for this run waits or runs.
    """
    run, kept = prepared(words, request)
    folder = run.folder.absolute()
    submission = Submission(folder)
    script = submission.path / "submit.sbatch"
    job = Job(
        name=folder.name,
        about=_about(request.command, f"sbatch {shlex.quote(str(script))}"),
        output=scripts.output_path(submission.logs(request.cluster), "%j.out"),
        folder=str(Path.cwd()),
        words=kept,
        run=str(folder),
        script=str(script),
        successors=str(submission.path / SUCCESSORS),
        dependents=str(submission.path / DEPENDENTS),
    )
    queued = Queued(folder, script, scripts.render("train", job, request.cluster))
    if request.dry_run:
        return queued
    _try_out(queued, request)
    _check_idle(submission, folder)
    if run.config.overwrite and folder.exists():
        run_folder.archive(folder)
    return _queue(queued, submission, "train", request)


def sweep(
    rows: Sequence[GridRow],
    home: Path,
    request: SubmitRequest,
    *,
    done: Sequence[str] = (),
    overwrite: bool = False,
) -> Queued:
    """Queue the runs of a grid as one array job, without those that are finished, wait or run.

    Args:
        rows: all runs; their numbers do not matter.
        home: the group's folder.
        request: the cluster, and what comes after.
        done: names of finished runs.
        overwrite: archive the folders of the queued runs.

    Raises:
        InputError: as `train`.
    """
    submission = Submission(home)
    for row in rows:
        scripts.check_words(row.words)
        scripts.check_folder(row.folder)
    script, file = submission.path / "sweep.sbatch", submission.path / grid.FILE
    before = grid.read(file)
    busy = _busy(submission, before)
    merged = grid.merged(before, rows, list(busy))
    skipped = dict.fromkeys(done, "finished")
    wanted: dict[int, str] = {}
    places = {row.name: row.row for row in merged}
    for row in rows:
        place = places[row.name]
        if place in busy:
            skipped[row.name] = f"job {busy[place]} waits or runs"
        elif row.name not in skipped:
            wanted[place] = row.name
    job = Job(
        name=home.name,
        about=_about(request.command, f"sbatch --array=ROWS {shlex.quote(str(script))}"),
        output=scripts.output_path(submission.logs(request.cluster), "%A_%a.out"),
        folder=str(Path.cwd()),
        grid=str(file),
        array=scripts.array_of(wanted or [row.row for row in merged], request.cluster.throttle),
        script=str(script),
        successors=str(submission.path / SUCCESSORS),
        dependents=str(submission.path / DEPENDENTS),
    )
    text = scripts.render("sweep", job, request.cluster)
    queued = Queued(home.absolute(), script, text, rows=wanted, skipped=skipped)
    if request.dry_run:
        return queued
    if not wanted:
        own = {busy[places[row.name]] for row in rows if places[row.name] in busy}
        _follow(queued, submission, sorted(own), request)
        return queued
    _try_out(queued, request)
    submission.prepare(request.cluster)
    for row in merged:
        if overwrite and row.row in wanted and Path(row.folder).exists():
            run_folder.archive(Path(row.folder))
    with writing("runs_dir", submission.path):
        grid.write(file, merged)
    return _queue(queued, submission, "sweep", request)


def command(words: Sequence[str], home: Path, request: SubmitRequest) -> Queued:
    """Queue any `optbench` command.

    Args:
        words: command and its words.
        home: folder whose ``slurm/`` keeps script and output.
        request: the cluster, and what comes before and after.
    """
    queued = _analysis(words, Submission(home), request)
    if request.dry_run:
        return queued
    _try_out(queued, request)
    return _queue(queued, Submission(home), words[0], request)


def _analysis(words: Sequence[str], submission: Submission, request: SubmitRequest) -> Queued:
    name = words[0]
    script = _free(submission.path, name)
    job = Job(
        name=f"{submission.path.parent.name}-{name}",
        about=_about(shlex.join(["optbench", *redact_argv(words)]), f"sbatch {shlex.quote(str(script))}"),
        output=scripts.output_path(submission.logs(request.cluster), f"{name}-%j.out"),
        folder=str(Path.cwd()),
        words=list(words),
    )
    return Queued(submission.path.parent, script, scripts.render("analysis", job, request.cluster))


def _try_out(queued: Queued, request: SubmitRequest) -> None:
    """Let SLURM test the script before anything is written, so that a refused one leaves no trace."""
    slurm.require()
    slurm.try_out(queued.text, request.cluster.model_dump())


def _queue(queued: Queued, submission: Submission, kind: Kind | str, request: SubmitRequest) -> Queued:
    """Write the script, queue it, and queue the commands that come after it."""
    submission.prepare(request.cluster)
    with writing("runs_dir", submission.path):
        atomic.write_text(queued.script, queued.text)
    flags = [f"--dependency=afterany:{':'.join(request.after)}"] if request.after else []
    queued.job = slurm.submit(queued.script, *flags, cluster=request.cluster.model_dump())
    try:
        submission.add(queued.job, kind, queued.script, list(queued.rows))
        for name in (SUCCESSORS, DEPENDENTS):
            (submission.path / name).unlink(missing_ok=True)
    except OSError as error:
        # The job is queued and will train, but `optbench status` does not know its number before it begins.
        request.say(
            f"warning: job {queued.job} is queued, but could not be recorded ({error.strerror or error})"
        )
    _add_followers(queued, submission, (queued.job,), request)
    return queued


def _follow(queued: Queued, submission: Submission, jobs: Sequence[str], request: SubmitRequest) -> None:
    """Queue the commands after jobs that wait or run, where none waits: the command that queued them may have died."""
    entries = [entry for entry in submission.jobs() if entry.kind not in ("train", "sweep")]
    # A follower that was requeued is no follower of the jobs that it waits for now.
    entries = [entry for entry in entries if entry.job != os.environ.get("SLURM_JOB_ID")]
    alive = {job for job, task in slurm.tasks([entry.job for entry in entries]).items() if not task.is_over}
    waiting = [_words_of(Path(entry.script)) for entry in entries if entry.job in alive]
    missing = [
        words
        for words in request.then
        if _words_in(_analysis(words, submission, request).text) not in waiting
    ]
    if jobs and missing:
        numbers = tuple(dict.fromkeys(job.partition("_")[0] for job in jobs))
        _add_followers(queued, submission, numbers, replace(request, then=tuple(missing)))


def _words_of(script: Path) -> str:
    try:
        return _words_in(script.read_text(encoding="utf-8"))
    except OSError:
        return ""


def _words_in(text: str) -> str:
    """Return the part of a rendered script that holds the command's words."""
    return text.partition("words=(\n")[2].partition("\n)")[0]


def _add_followers(
    queued: Queued, submission: Submission, jobs: tuple[str, ...], request: SubmitRequest
) -> None:
    for words in request.then:
        # afterany: also if a run failed; the report says so.
        one = replace(request, after=jobs, then=())
        follower = _queue(_analysis(words, submission, one), submission, words[0], one)
        assert follower.job is not None
        queued.then.append((follower.job, str(follower.script)))
    if queued.then:
        atomic.write_text(submission.path / DEPENDENTS, "".join(f"{job}\n" for job, _ in queued.then))


def busy_runs(home: Path, *, must_know: bool = False) -> dict[str, str]:
    """Return name → job of the runs of a group's grid that wait or run.

    Args:
        home: the group's folder.
        must_know: raise an error where SLURM does not answer, in place of taking the jobs as ended.

    Raises:
        InputError: with ``must_know``.
    """
    submission = Submission(home)
    rows = grid.read(submission.path / grid.FILE)
    names = {row.row: row.name for row in rows}
    if must_know:
        slurm.require_answer([entry.job for entry in submission.jobs()])
    return {names[row]: job for row, job in _busy(submission, rows).items()}


def check_rows(rows: Sequence[GridRow], home: Path) -> None:
    """Check that no run of a group's grid waits or runs with other words than these; nothing is written.

    Raises:
        InputError: one does.
    """
    submission = Submission(home)
    before = grid.read(submission.path / grid.FILE)
    grid.merged(before, rows, list(_busy(submission, before)))


def submitted_runs(home: Path) -> set[tuple[str, str]]:
    """Return name and identity of each run of a group's grid that was queued at least once."""
    submission = Submission(home)
    queued = {row for entry in submission.jobs() for row in entry.rows}
    rows = grid.read(submission.path / grid.FILE)
    return {(row.name, row.identity) for row in rows if row.row in queued}


def _busy(submission: Submission, rows: Sequence[GridRow]) -> dict[int, str]:
    """Return row number → job that waits for the row or runs it, among the jobs submitted here."""
    tasks = {entry.task(row): row for entry in submission.jobs() for row in entry.rows}
    known = slurm.tasks(list(tasks))
    busy = {tasks[job]: job for job, task in known.items() if not task.is_over}
    held = {row.row: leases.holder(leases.path_of(Path(row.folder))) for row in rows}
    # Submitted by hand: it holds the run's lease.
    others = slurm.tasks([lease.job for lease in held.values() if lease is not None])
    alive = {job for job, task in others.items() if not task.is_over}
    return busy | {row: lease.job for row, lease in held.items() if lease is not None and lease.job in alive}


def _check_idle(submission: Submission, folder: Path) -> None:
    lease = leases.holder(leases.path_of(folder))
    jobs = [entry.job for entry in submission.jobs()] + ([lease.job] if lease is not None else [])
    for job, task in slurm.tasks(jobs).items():
        if not task.is_over:
            reason = f"has job {job} already, which is {task.state}"
            fix = f"optbench status {folder.parent} --cancel {folder.name}"
            raise InputError("submit", folder, reason, fix=fix)


def _check_world_size(value: str, cluster: ClusterConfig) -> None:
    if value not in ("null", str(cluster.world_size)):
        product = f"cluster.nodes × processes per node = {cluster.nodes} × {cluster.processes_per_node}"
        reason = f"disagrees with {product} = {cluster.world_size}"
        raise InputError(
            "world_size", value, reason, fix="leave it out, or change cluster.nodes, cluster.gpus"
        )


def _about(command: str, again: str) -> list[str]:
    return [" ".join(command.split()), f"Submit it again: {again}"]


def _free(folder: Path, name: str) -> Path:
    """Return ``name.sbatch``, or the first of ``name-2.sbatch``, … that does not exist."""
    path, number = folder / f"{name}.sbatch", 1
    while path.exists():
        number += 1
        path = folder / f"{name}-{number}.sbatch"
    return path
