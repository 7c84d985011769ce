"""Train the runs of a comparison, one after the other or side by side. Torch-free: runs train in other processes."""

from __future__ import annotations

import os
import shlex
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import filelock

from analysis.compare import side_by_side
from analysis.compare.arguments import ComparisonPlan
from analysis.compare.progress import SessionProgress, Verbosity
from analysis.formatting import listing
from analysis.runs import reading
from analysis.runs.measure import final_value, measure_of
from harness.config import compose
from harness.errors import ExitCode, InputError
from harness.files import atomic
from harness.jobs import launch
from harness.preparation import Prepared, prepare
from harness.record import folder as run_folder
from harness.record.readers import Summary
from harness.record.schema import SCHEMA_VERSION
from harness.redaction import redact_text

_MOST_KEPT = 64 * 1024
"""Most bytes of a failed run's output, counted from its end, that are added to its log."""


class Trainer:
    """How all sessions of a command train: what is printed, and how many runs at once.

    Attributes:
        as_json: standard output is reserved for one JSON document.
        verbosity: of the command.
        concurrency: runs that train side by side.
    """

    def __init__(self, *, as_json: bool, verbosity: Verbosity, concurrency: int = 1) -> None:
        self.as_json, self.verbosity, self.concurrency = as_json, verbosity, concurrency

    @contextmanager
    def output(self) -> Iterator[IO[Any] | None]:
        """Yield where the output of one run's processes goes; None: they inherit this process' output."""
        if self.verbosity is Verbosity.VERBOSE:
            yield sys.stderr if self.as_json else None
        else:
            # Each run writes its own log.txt; this output is needed only of a process that dies.
            with tempfile.TemporaryFile(buffering=0) as file:
                yield file

    def say(self, text: str) -> None:
        """Print a line, unless quiet: on standard output, or on standard error where that is for JSON."""
        if self.verbosity is not Verbosity.QUIET:
            print(text, file=sys.stderr if self.as_json else sys.stdout, flush=True)


def _append_to_log(output: IO[Any], run: Prepared) -> None:
    """Append what the processes of a run printed to its log.txt, without lines that the log already has."""
    size = os.fstat(output.fileno()).st_size
    text = os.pread(output.fileno(), min(size, _MOST_KEPT), max(0, size - _MOST_KEPT)).decode(
        errors="replace"
    )
    log = run.folder / "log.txt"
    known = set(log.read_text(errors="replace").splitlines()) if log.is_file() else set()
    lines = [line for line in redact_text(text).splitlines() if line not in known]
    if lines and run.folder.is_dir():
        with log.open("a", encoding="utf-8") as file:
            file.write("\n".join(["printed by the processes of this run:", *lines, ""]))


@contextmanager
def lock_group(group: Path, timeout: float = 0) -> Iterator[None]:
    """Hold a lock on a group, so that no other command trains its runs at the same time.

    Args:
        group: folder of the group; it need not exist.
        timeout: how long to wait for the lock, s.

    Raises:
        InputError: another command holds the lock.
    """
    group.parent.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(group.with_name(f".{group.name}.lock"), timeout=timeout)
    try:
        lock.acquire()
    except filelock.Timeout as error:
        reason = "is being trained by another compare or sweep"
        raise InputError(
            "group", group, reason, fix="wait for it, or group=… of your own; optbench status shows its runs"
        ) from error
    except (OSError, NotImplementedError):
        # On a file system without locks the lock of each run's folder reports it.
        yield
        return
    try:
        yield
    finally:
        lock.release()


class Session:
    """Runs that are trained, except those that have ended already.

    Attributes:
        refusals: bad input that only the runs' own processes detected.
    """

    def __init__(
        self,
        runs: Sequence[Prepared],
        trainer: Trainer,
        *,
        group: str,
        is_over: Callable[[Prepared], bool] | None = None,
        steps_later: int = 0,
    ) -> None:
        """Check the folders of the runs; nothing is started.

        Args:
            runs: in the order of training.
            trainer: trains them.
            group: named in the command that resumes after an interruption.
            is_over: True for a run that is not trained again; None: `is_done`.
            steps_later: steps of later sessions, for the estimate of the remaining time.

        Raises:
            InputError: a folder that belongs to another run, or runs that do not fit side by side.
        """
        self._group, self._trainer, self._later = group, trainer, steps_later
        self.refusals: list[InputError] = []
        is_over = is_over or is_done
        over: list[Prepared] = []
        pending: list[Prepared] = []
        for run in runs:
            (over if is_over(run) else pending).append(run)
        states = Counter(state_of(run) for run in over)
        if over:
            trainer.say(f"{listing([f'{n} {state}' for state, n in states.items()])}: not repeated")
        for run in pending:
            run_folder.check(run.folder, run.config, run.identity, run.shorter_runs)
        self._pending = side_by_side.prepared(pending, trainer.concurrency)

    def train(self, after: Callable[[], None] = lambda: None) -> int:
        """Train the remaining runs, call ``after`` after each of them, and return the exit code."""
        code, is_interrupted = ExitCode.DONE, False
        with SessionProgress(
            sum(run.config.steps for run in self._pending),
            len(self._pending),
            verbosity=self._trainer.verbosity,
            to_stderr=self._trainer.as_json,
            steps_later=self._later,
        ) as progress:
            train = self._in_turn if self._trainer.concurrency == 1 else self._side_by_side
            for number, ended, result in train(progress):
                after()
                progress.end(number, result, is_finished=ended == ExitCode.DONE)
                if ended == ExitCode.RESUMABLE:
                    is_interrupted = True
                code = code or ended
        if not is_interrupted:
            return code
        group = shlex.quote(f"group={self._group}")
        self._trainer.say(f"interrupted: the same command with {group} resumes from here")
        return ExitCode.RESUMABLE

    def _in_turn(self, progress: SessionProgress) -> Iterator[tuple[int, int, str]]:
        """Train one run after the other until one is interrupted; yield number, exit code and end of each."""
        for number, run in enumerate(self._pending, 1):
            progress.begin(number, run.folder, run.config.steps)
            code, result = self._one(run)
            yield number, code, result
            if code == ExitCode.RESUMABLE:
                return

    def _side_by_side(self, progress: SessionProgress) -> Iterator[tuple[int, int, str]]:
        """Train several runs at once, and none that has not begun after a signal; yield as they end."""

        def one(number: int, run: Prepared) -> tuple[int, int, str] | None:
            if signals.received is not None:
                return None
            progress.begin(number, run.folder, run.config.steps)
            return (number, *self._one(run))

        pool = ThreadPoolExecutor(self._trainer.concurrency, thread_name_prefix="run")
        with launch.ThreadSignals() as signals:
            try:
                tasks = [pool.submit(one, number, run) for number, run in enumerate(self._pending, 1)]
                for task in as_completed(tasks):
                    if (ended := task.result()) is not None:
                        yield ended
            finally:
                # Runs that train end before this command does, also where writing the ledger failed.
                pool.shutdown(cancel_futures=True)

    def _one(self, run: Prepared) -> tuple[int, str]:
        """Train one run; return its exit code and a description of its end."""
        started = time.monotonic()
        with self._trainer.output() as output:
            try:
                outcome = launch.start(run, output=output)
                state, reason = outcome.state, outcome.reason
                is_refused = False
            except InputError as error:
                # Only the run's own processes detected it: this run is impossible, the others are not.
                state, reason, is_refused = "failed", str(error), True
                self.refusals.append(error)
            except KeyboardInterrupt:
                return ExitCode.RESUMABLE, "interrupted"
            if not (run.folder / "status.json").is_file():
                _record_failed_start(run, state, reason)
            elif state == "failed" and not is_refused:
                # The folder of a refused run may belong to another process: do not write to it.
                if self._trainer.verbosity is not Verbosity.VERBOSE and output is not None:
                    _append_to_log(output, run)
                reason = f"{reason} ({run.folder / 'log.txt'})"
        summary = reading.record(run.folder / "summary.json", Summary, [])
        measure = measure_of({}, summary)
        value = final_value(measure, summary)
        result = f"{measure.title} {measure.short(value)}" if state == "finished" else reason
        code = {"finished": ExitCode.DONE, "interrupted": ExitCode.RESUMABLE}.get(state, ExitCode.RUN_FAILED)
        return code, f"{state} in {time.monotonic() - started:.1f} s: {result}"


def train(plan: ComparisonPlan) -> tuple[int, Path]:
    """Train the runs of a plan that are not finished.

    Returns:
        The exit code and the folder of the group.

    Raises:
        InputError: bad input of any arm; nothing was started.
    """
    trainer = Trainer(as_json=plan.as_json, verbosity=plan.verbosity, concurrency=plan.concurrency)
    runs = prepare_runs(plan, trainer.say)
    folder = runs[0].folder.parent
    session = Session(runs, trainer, group=plan.group)
    with lock_group(folder):
        return session.train(), folder


def write_provenance(folder: Path, plan: ComparisonPlan) -> None:
    """Record the command and optimizers of a comparison in its group's folder, after those of earlier commands."""
    optimizers = [arm.overrides[0].partition("=")[2] for arm in plan.arms]
    earlier = reading.read_provenance(folder)
    merged = {
        "commands": list(dict.fromkeys([*earlier["commands"], plan.command])),
        "optimizers": list(dict.fromkeys([*earlier["optimizers"], *optimizers])),
    }
    atomic.write_json(folder / reading.PROVENANCE_FILE, {"schema_version": 1, **merged})


def prepare_runs(plan: ComparisonPlan, say: Callable[[str], None]) -> list[Prepared]:
    """Compose and check all runs of a plan: all arms of the first seed, then those of the next one.

    Raises:
        InputError: the first error in any of them.
    """
    return [
        prepare(plan.overrides(arm, seed), say=say, writes_folder=False)
        for seed in plan.seeds
        for arm in plan.arms
    ]


def is_done(run: Prepared) -> bool:
    """Return True if the folder holds this run, finished, and it is not to be overwritten."""
    return bool(state_of(run)) and (run.folder / "DONE").exists() and not run.config.overwrite


def has_ended(run: Prepared) -> bool:
    """Return True if the run is done or diverged: it would diverge again."""
    return is_done(run) or (state_of(run) == "diverged" and not run.config.overwrite)


def state_of(run: Prepared) -> str:
    """Return the state of this run as its folder records it; empty if it holds no run or another one."""
    status = reading.mapping(run.folder / "status.json", [])
    return str(status.get("state", "running")) if status.get("identity") == run.identity else ""


def _record_failed_start(run: Prepared, state: str, reason: str) -> None:
    """Write the folder of a run that died before it wrote one, so that the report shows the failure."""
    run.folder.mkdir(parents=True, exist_ok=True)
    atomic.write_text(run.folder / "config.yaml", compose.to_yaml(run.config))
    now = run_folder.now()
    attempt = {
        "started": now,
        "ended": now,
        "state": state,
        "reason": reason,
        "first_step": 0,
        "last_step": 0,
    }
    status = {
        "schema_version": SCHEMA_VERSION,
        "identity": run.identity,
        "wandb_run_id": None,
        "state": state,
    }
    steps = {"step": 0, "steps": run.config.steps, "updated": now, "attempts": [attempt]}
    atomic.write_json(run.folder / "status.json", {**status, **steps})
