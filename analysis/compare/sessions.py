"""Runs of a comparison, made one after the other. Torch-free: runs train in other processes."""

from __future__ import annotations

import os
import shlex
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import filelock

from analysis.compare.arguments import ComparisonPlan
from analysis.compare.progress import SessionProgress, Verbosity
from analysis.formatting import listing
from analysis.runs import reading
from harness.config import compose
from harness.errors import InputError
from harness.files import atomic
from harness.jobs import launch, warm
from harness.preparation import Prepared, prepare
from harness.record import folder as run_folder
from harness.record.readers import Summary
from harness.record.schema import SCHEMA_VERSION
from harness.redaction import redact_text

FINISHED, FAILED, INTERRUPTED = 0, 3, 75
_MOST_KEPT = 64 * 1024
"""Bytes of what a failed run's processes printed, of its end, that its log keeps."""


class Trainer:
    """How a command trains its runs and what it prints: small runs share processes, whose output goes aside.

    Entered around the sessions of a command.

    Attributes:
        as_json: standard output is for one JSON document.
        verbosity: of the command.
        output: where the runs' processes print; None: where this one does.
    """

    def __init__(self, *, as_json: bool, verbosity: Verbosity) -> None:
        self.as_json, self.verbosity = as_json, verbosity
        self.output: IO[Any] | None = sys.stderr if as_json else None
        self._aside: IO[bytes] | None = None
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        if self.verbosity is not Verbosity.VERBOSE:
            # What matters is in each run's log.txt; of a process that dies it is all that is known.
            self._aside = self.output = self._stack.enter_context(tempfile.TemporaryFile(buffering=0))
        self._stack.enter_context(warm.sharing(self.output))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def say(self, text: str) -> None:
        """Print a line, unless quiet: on standard output, or on standard error where that is for JSON."""
        if self.verbosity is not Verbosity.QUIET:
            print(text, file=sys.stderr if self.as_json else sys.stdout, flush=True)

    def printed(self) -> int:
        """Return how much the processes have printed aside so far, bytes."""
        return 0 if self._aside is None else os.fstat(self._aside.fileno()).st_size

    def keep(self, run: Prepared, start: int) -> None:
        """Add what the processes have printed since ``start`` to the run's log.txt, without what is in it."""
        if self._aside is None:
            return
        # Not by seek and read: the processes write at the same position of the same open file.
        size = max(0, self.printed() - start)
        text = os.pread(
            self._aside.fileno(), min(size, _MOST_KEPT), start + max(0, size - _MOST_KEPT)
        ).decode(errors="replace")
        log = run.folder / "log.txt"
        known = set(log.read_text(errors="replace").splitlines()) if log.is_file() else set()
        lines = [line for line in redact_text(text).splitlines() if line not in known]
        if lines and run.folder.is_dir():
            with log.open("a", encoding="utf-8") as file:
                file.write("\n".join(["printed by the processes of this run:", *lines, ""]))


@contextmanager
def lock_group(group: Path) -> Iterator[None]:
    """Keep other commands from training runs of the same group meanwhile.

    Args:
        group: folder of the group; it need not exist.

    Raises:
        InputError: another command does so now.
    """
    group.parent.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(group.with_name(f".{group.name}.lock"), timeout=0)
    try:
        lock.acquire()
    except filelock.Timeout as error:
        reason = "is being trained by another compare or sweep"
        raise InputError(
            "group", group, reason, fix="wait for it, or group=… of your own; optbench status shows its runs"
        ) from error
    except (OSError, NotImplementedError):
        # A file system without locks: each run's folder has a lock of its own, which says so.
        yield
        return
    try:
        yield
    finally:
        lock.release()


class Session:
    """Runs that are made one after the other, without those that are over already.

    Attributes:
        refusals: bad input that only the runs' own processes found.
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
            runs: in the order in which they are to be made.
            trainer: trains them.
            group: of the command that goes on after an interruption.
            is_over: a run that is not to be made again; None: one that finished (`is_done`).
            steps_later: of the runs of later sessions, for the time left.

        Raises:
            InputError: a folder that belongs to another run.
        """
        self._group, self._trainer, self._later = group, trainer, steps_later
        self._pending: list[Prepared] = []
        self.refusals: list[InputError] = []
        is_over = is_over or is_done
        over: list[Prepared] = []
        for run in runs:
            (over if is_over(run) else self._pending).append(run)
        states = Counter(state_of(run) for run in over)
        if over:
            trainer.say(f"{listing([f'{n} {state}' for state, n in states.items()])}: not repeated")
        for run in self._pending:
            run_folder.check(run.folder, run.config, run.identity, run.shorter_runs)

    def train(self, after: Callable[[], None] = lambda: None) -> int:
        """Make the runs that are not over yet; the exit code of the whole. ``after`` is called after each of them."""
        code = FINISHED
        with SessionProgress(
            sum(run.config.steps for run in self._pending),
            len(self._pending),
            verbosity=self._trainer.verbosity,
            to_stderr=self._trainer.as_json,
            steps_later=self._later,
        ) as progress:
            for number, run in enumerate(self._pending, 1):
                progress.begin(number, run.folder, run.config.steps)
                ended, result = self._one(run)
                after()
                progress.end(result, is_finished=ended == FINISHED)
                if ended == INTERRUPTED:
                    break
                code = code or ended
            else:
                return code
        group = shlex.quote(f"group={self._group}")
        self._trainer.say(f"interrupted: the same command with {group} goes on from here")
        return INTERRUPTED

    def _one(self, run: Prepared) -> tuple[int, str]:
        """Train one run; its exit code, and in words how it ended."""
        started, printed = time.monotonic(), self._trainer.printed()
        try:
            outcome = launch.start(run, output=self._trainer.output)
            state, reason = outcome.state, outcome.reason
            is_refused = False
        except InputError as error:
            # Found by the run's own processes only: this run can't be made, the others can.
            state, reason, is_refused = "failed", str(error), True
            self.refusals.append(error)
        except KeyboardInterrupt:
            return INTERRUPTED, "interrupted"
        if not (run.folder / "status.json").is_file():
            _record_failed_start(run, state, reason)
        elif state == "failed" and not is_refused:
            # A run that was refused may be another process' run, whose folder is not ours to write to.
            self._trainer.keep(run, printed)
            reason = f"{reason} ({run.folder / 'log.txt'})"
        loss = reading.number(reading.record(run.folder / "summary.json", Summary, []).get("val/loss"))
        result = f"validation loss {loss:.4f}" if state == "finished" else reason
        code = {"finished": FINISHED, "interrupted": INTERRUPTED}.get(state, FAILED)
        return code, f"{state} in {time.monotonic() - started:.1f} s: {result}"


def train(plan: ComparisonPlan) -> tuple[int, Path]:
    """Train the runs of a plan that are not finished.

    Returns:
        The exit code and the folder of the group.

    Raises:
        InputError: bad input of any arm; nothing was started.
    """
    with Trainer(as_json=plan.as_json, verbosity=plan.verbosity) as trainer:
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
    """All runs of a plan, composed and checked: seeds outside, arms inside.

    Raises:
        InputError: the first thing that is wrong with any of them.
    """
    return [
        prepare(plan.overrides(arm, seed), say=say, writes_folder=False)
        for seed in plan.seeds
        for arm in plan.arms
    ]


def is_done(run: Prepared) -> bool:
    """The folder holds this very run, finished, and it is not to be replaced."""
    return bool(state_of(run)) and (run.folder / "DONE").exists() and not run.config.overwrite


def has_ended(run: Prepared) -> bool:
    """As `is_done`, or this very run diverged, as it would again."""
    return is_done(run) or (state_of(run) == "diverged" and not run.config.overwrite)


def state_of(run: Prepared) -> str:
    """State of this very run as its folder tells it; empty if that holds no run, or another one."""
    status = reading.mapping(run.folder / "status.json", [])
    return str(status.get("state", "running")) if status.get("identity") == run.identity else ""


def _record_failed_start(run: Prepared, state: str, reason: str) -> None:
    """Leave a run folder of a run that died before it wrote one: a failure is a row, not a gap."""
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
