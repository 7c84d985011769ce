"""Start the processes of one run on this machine and say what became of it. Torch-free."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from contextvars import ContextVar
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from pathlib import Path
from types import FrameType
from typing import IO, Self

import filelock
import psutil

from harness import import_path
from harness.config.errors import InputError
from harness.config.launcher import visible_devices
from harness.config.schema import RunConfig
from harness.files import atomic, locks
from harness.preparation import Prepared, prepare
from harness.process import exit_markers, parent
from harness.process.stop import REPEAT_S, handled_signals, outlive_the_terminal
from harness.record import folder as run_folder
from harness.record import readers
from harness.record.folder import REQUEUE, now
from harness.record.readers import SILENT, Status
from harness.train import ERROR_FILE

EXIT_CODES = {"finished": 0, "diverged": 3, "failed": 3, "interrupted": 75}
"""Of `optbench`, by the state that a run ended in."""

SHARED: ContextVar[Callable[[Prepared], RunOutcome | None] | None] = ContextVar("shared", default=None)
"""Trains a run in processes that other runs share, or returns None where it must have its own."""
LOCK_S = 2.0
"""How long a folder whose processes have ended may still be locked: the system frees a killed process' lock late."""


@dataclass(frozen=True)
class RunOutcome:
    """How a run ended.

    Attributes:
        folder: its run folder.
        state: finished, diverged, failed or interrupted.
        exit_code: `EXIT_CODES` of the state.
        reason: one line.
    """

    folder: Path
    state: str
    exit_code: int
    reason: str


def run(overrides: Sequence[str], *, say: Callable[[str], None], output: IO[str] | None = None) -> RunOutcome:
    """Prepare and train one run in processes of its own; returns when they have ended.

    Args:
        overrides: ``key=value`` words.
        say: where messages go.
        output: where the processes' standard output goes (None: ours).

    Raises:
        InputError: bad input; nothing was started.
    """
    return start(prepare(overrides, say=say), output=output)


def start(prepared: Prepared, *, output: IO[str] | None = None) -> RunOutcome:
    """Train a prepared run in processes of its own, or in those that it shares with others (`harness.jobs.warm`).

    Args:
        prepared: the run.
        output: where standard output and standard error of the processes go (None: each to ours).
    """
    shared = SHARED.get()
    if shared is not None and (shared_outcome := shared(prepared)) is not None:
        return shared_outcome
    command, extra = launch_command(prepared.config, prepared.overrides)
    with tempfile.TemporaryDirectory() as scratch:
        error = Path(scratch) / "error.json"
        began = time.time()
        with Forwarding(Path(scratch)) as forwarding:
            # A session of its own keeps a terminal's Ctrl-C from reaching launcher and workers each by itself.
            process = subprocess.Popen(
                command,
                env={**environment(), **extra, ERROR_FILE: str(error), exit_markers.FOLDER_VARIABLE: scratch},
                stdout=output,
                stderr=output,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                preexec_fn=ignore_usr1,
            )
            forwarding.to(partial(_signal_workers, process))
            code = process.wait()
        if (bad_input := read_error(error)) is not None:
            raise bad_input
        silent = exit_markers.missing_ranks(Path(scratch))
    return outcome(prepared.folder, code, silent, forwarding.first, began)


def environment() -> dict[str, str]:
    """Return the environment of every process that trains for this command: they watch it, and import safely."""
    return {**os.environ, **import_path.environment(), **parent.environment()}


def launch_command(config: RunConfig, overrides: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """The command line of the processes, and the environment variables it needs beside ours.

    One process needs no launcher. Several get `accelerate launch` with every choice spelled out, so that a
    configuration file of the user's `accelerate config` changes nothing. On CPUs the ``--cpu`` flag would
    start one process, silently; ``--multi_gpu`` with ACCELERATE_USE_CPU starts them all, over gloo.
    """
    assert config.world_size is not None
    training = ["harness.train", *training_words(config, overrides)]
    if config.world_size == 1:
        return [sys.executable, "-P", "-m", *training], {}
    flags = [
        "--multi_gpu",
        "--num_processes",
        str(config.world_size),
        "--num_machines",
        "1",
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
        "--main_process_port",
        str(free_port()),
    ]
    extra = {} if visible_devices() else cpu_environment()
    extra["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", "1")
    return [
        sys.executable,
        "-P",
        "-m",
        "accelerate.commands.launch",
        *flags,
        "-m",
        *training,
    ], extra


def training_words(config: RunConfig, overrides: Sequence[str]) -> list[str]:
    """Return the words of each of the run's processes."""
    if any(word.startswith("world_size=") for word in overrides):
        return list(overrides)
    return [*overrides, f"world_size={config.world_size}"]


def cpu_environment() -> dict[str, str]:
    """Return the environment variables of several processes on CPUs."""
    return {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}


def outcome(
    folder: Path, code: int, silent: list[int], asked: signal.Signals | None, began: float = 0.0
) -> RunOutcome:
    """What became of a run whose processes have ended; status.json is completed where rank 0 could not do it.

    Only the holder of the folder's lock edits it: another process may be training this run, which these were kept from.

    Args:
        folder: of the run.
        code: exit code of the launcher.
        silent: ranks that started and did not say that they end (`exit_markers`).
        asked: the signal that it was told to stop by.
        began: Unix time before the processes started; an older status.json is of an earlier attempt.
    """
    early = "before the first step"
    if asked is not None:
        unknown = RunOutcome(
            folder, "interrupted", 75, f"stopped by {exit_markers.signal_name(asked)} {early}"
        )
    else:
        unknown = RunOutcome(folder, "failed", 3, f"the processes ended with code {code} {early}")
    if not (folder / readers.STATUS).is_file():
        return unknown
    try:
        lock = locks.acquire(run_folder.lock_file(folder), key="runs_dir", timeout=LOCK_S)
    except filelock.Timeout:
        return replace(unknown, reason=f"{unknown.reason}; another process is training this run")
    except (InputError, OSError):
        lock = None  # nothing can be written there; what was written can be read
    try:
        status, _ = readers.status(folder)
        if status is None or not status.attempts or not _is_since(status.updated, began):
            return unknown
        return _completed(folder, status, code, silent, asked, may_edit=lock is not None)
    finally:
        if lock is not None:
            lock.release()


def _completed(
    folder: Path,
    status: Status,
    code: int,
    silent: list[int],
    asked: signal.Signals | None,
    *,
    may_edit: bool,
) -> RunOutcome:
    """Return what status.json says, after it was completed with what rank 0 could not write."""
    attempt, step = status.attempts[-1], status.step or 0
    is_requeued = False
    if status.state == "running" and (folder / run_folder.DONE).exists():
        # Killed between the two last files that it writes.
        _end(status, "finished", "all steps done")
    elif status.state == "running" and asked is not None:
        _end(status, "interrupted", f"stopped at once by {exit_markers.signal_name(asked)} after step {step}")
        is_requeued = True
    elif status.state == "running":
        # Killed from outside: rank 0 could not say so itself.
        who = exit_markers.describe_missing(silent) if silent else f"the processes died (code {code})"
        _end(status, "failed", f"{who} after step {step}")
    elif status.state == "failed" and silent and SILENT not in attempt.reason:
        # The others only saw their connection break. One that hung was killed because of that.
        attempt.reason = f"{exit_markers.describe_missing(silent)}; then {attempt.reason}"
    else:
        may_edit = False
    if may_edit:
        # A full or read-only disk changes nothing about how the run ended.
        with suppress(OSError):
            atomic.write_json(folder / readers.STATUS, status.facts())
            if is_requeued:
                atomic.write_text(folder / REQUEUE, f"{step}\n")
    return RunOutcome(folder, status.state, EXIT_CODES.get(status.state, 3), attempt.reason)


def _is_since(time_text: str | None, began: float) -> bool:
    """Return True if a time that `now` wrote, which has whole seconds, is not before ``began``."""
    try:
        return datetime.fromisoformat(time_text or "").timestamp() >= int(began)
    except ValueError:
        return began == 0.0


def _end(status: Status, state: str, reason: str) -> None:
    status.state, status.updated = state, now()
    attempt = status.attempts[-1]
    attempt.state, attempt.ended, attempt.reason = state, now(), reason


def read_error(path: Path) -> InputError | None:
    """Return the bad input that a run's first process found (`harness.train.ERROR_FILE`); None if it found none."""
    try:
        return InputError(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return None


def ignore_usr1() -> None:
    """In the new process, before it runs: a launcher dies of SIGUSR1, which SLURM sends to every process of a step.

    The training processes take the signal over when they are ready to.
    """
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)


class Forwarding:
    """While it is entered, passes signals on to the training processes as SIGTERM and lets them end by themselves.

    To them and not to a launcher between: torch's elastic agent would print a traceback, and kill after 30 s
    what has not ended. Processes that end by themselves with code 0 it accepts. A second signal, `REPEAT_S` after the
    first or later, kills them.

    Args:
        notes: folder (`exit_markers`) that the first signal is noted in.

    Attributes:
        first: the first signal that came.
    """

    def __init__(self, notes: Path) -> None:
        self._notes = notes
        self.first: signal.Signals | None = None
        self._came_at = 0.0
        self._send: Callable[[signal.Signals], None] | None = None
        self._previous = {}

    def __enter__(self) -> Self:
        # Python lets other threads (a notebook's, a server's) set no handlers; signals then end this process as ever.
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._forward) for number in handled_signals()}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def to(self, send: Callable[[signal.Signals], None]) -> None:
        """Pass them on through ``send``, also what came before the processes were there."""
        self._send = send
        if self.first is not None:
            send(signal.SIGTERM)

    def _forward(self, number: int, frame: FrameType | None) -> None:
        passed_on = signal.SIGTERM
        if self.first is None:
            self.first, self._came_at = signal.Signals(number), time.monotonic()
            exit_markers.note_signal(self._notes, self.first)
            if self.first is signal.SIGHUP:
                outlive_the_terminal()
        elif time.monotonic() - self._came_at >= REPEAT_S:
            passed_on = signal.SIGKILL
        else:
            return
        if self._send is not None:
            self._send(passed_on)


def _signal_workers(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    for worker in _workers(process.pid) or [process]:
        with suppress(psutil.NoSuchProcess):
            worker.send_signal(number)


def _workers(pid: int) -> list[psutil.Process]:
    """The processes at or below ``pid`` that run `harness.train` themselves; none while they are starting."""
    found = []
    with suppress(psutil.Error):
        parent = psutil.Process(pid)
        for process in [parent, *parent.children(recursive=True)]:
            words = process.cmdline()
            # "-P" or "-u" may be before it. A launcher has "-m accelerate…" before the module that it is to start.
            if "-m" in words and words[words.index("-m") + 1 :][:1] == ["harness.train"]:
                found.append(process)
    return found


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
