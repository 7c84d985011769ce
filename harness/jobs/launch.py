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
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import IO, Any, Self

import psutil

from harness.config.errors import InputError
from harness.config.launcher import visible_devices
from harness.config.schema import RunConfig
from harness.jobs import last_words
from harness.lifecycle import REPEAT_S, SIGNALS, SILENT
from harness.preparation import Prepared, prepare
from harness.record import atomic
from harness.record.folder import REQUEUE, now
from harness.train import ERROR_FILE

EXIT_CODES = {"finished": 0, "diverged": 3, "failed": 3, "interrupted": 75}
"""Of `optbench`, by the state that a run ended in."""

SHARED: ContextVar[Callable[[Prepared], RunOutcome | None] | None] = ContextVar("shared", default=None)
"""Trains a run in processes that other runs share, or returns None where it must have its own."""


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
        with Forwarding() as forwarding:
            # A session of its own keeps a terminal's Ctrl-C from reaching launcher and workers each by itself.
            process = subprocess.Popen(
                command,
                env={**os.environ, **extra, ERROR_FILE: str(error), last_words.FOLDER: scratch},
                stdout=output,
                stderr=output,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                preexec_fn=ignore_usr1,
            )
            forwarding.to(partial(_signal_workers, process))
            code = process.wait()
        if error.exists():
            raise InputError(**json.loads(error.read_text()))
        silent = last_words.silent(Path(scratch))
    return outcome(prepared.folder, code, silent, forwarding.first)


def launch_command(config: RunConfig, overrides: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """The command line of the processes, and the environment variables it needs beside ours.

    One process needs no launcher. Several get `accelerate launch` with every choice spelled out, so that a
    configuration file of the user's `accelerate config` changes nothing. On CPUs the ``--cpu`` flag would
    start one process, silently; ``--multi_gpu`` with ACCELERATE_USE_CPU starts them all, over gloo.
    """
    assert config.world_size is not None
    training = ["harness.train", *training_words(config, overrides)]
    if config.world_size == 1:
        return [sys.executable, "-m", *training], {}
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


def outcome(folder: Path, code: int, silent: list[int], asked: signal.Signals | None) -> RunOutcome:
    """What became of a run whose processes have ended; status.json is completed where rank 0 could not do it.

    Args:
        folder: of the run.
        code: exit code of the launcher.
        silent: ranks that started and did not say that they end (`last_words`).
        asked: the signal that it was told to stop by.
    """
    try:
        status = json.loads((folder / "status.json").read_text())
    except (OSError, json.JSONDecodeError):
        if asked is not None:
            return RunOutcome(folder, "interrupted", 75, f"stopped by {asked.name} before the first step")
        return RunOutcome(folder, "failed", 3, f"the processes ended with code {code} before the first step")
    attempt = status["attempts"][-1]
    if status["state"] == "running" and asked is not None:
        _note(status, "interrupted", f"stopped at once by {asked.name} after step {status['step']}")
        atomic.write_text(folder / REQUEUE, f"{status['step']}\n")
    elif status["state"] == "running":
        # Killed from outside: rank 0 could not say so itself.
        reason = f"the processes died (code {code}) after step {status['step']}"
        if silent:
            reason = f"{last_words.told(silent)} after step {status['step']}"
        _note(status, "failed", reason)
    elif status["state"] == "failed" and silent and SILENT not in attempt["reason"]:
        # The others only saw their connection break. One that hung was killed because of that.
        attempt["reason"] = f"{last_words.told(silent)}; then {attempt['reason']}"
    else:
        return _told(folder, status)
    atomic.write_json(folder / "status.json", status)
    return _told(folder, status)


def _note(status: dict[str, Any], state: str, reason: str) -> None:
    status |= {"state": state, "updated": now()}
    status["attempts"][-1] |= {"state": state, "ended": now(), "reason": reason}


def _told(folder: Path, status: dict[str, Any]) -> RunOutcome:
    state = status["state"]
    return RunOutcome(folder, state, EXIT_CODES.get(state, 3), status["attempts"][-1].get("reason", ""))


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

    Attributes:
        first: the first signal that came.
    """

    def __init__(self) -> None:
        self.first: signal.Signals | None = None
        self._came_at = 0.0
        self._send: Callable[[signal.Signals], None] | None = None
        self._previous = {}

    def __enter__(self) -> Self:
        # Python lets other threads (a notebook's, a server's) set no handlers; signals then end this process as ever.
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._forward) for number in SIGNALS}
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
        elif time.monotonic() - self._came_at >= REPEAT_S:
            passed_on = signal.SIGKILL
        else:
            return
        if self._send is not None:
            self._send(passed_on)


def _signal_workers(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    for worker in _workers(process.pid) or [process]:
        worker.send_signal(number)


def _workers(pid: int) -> list[psutil.Process]:
    """The processes at or below ``pid`` that run `harness.train` themselves; none while they are starting."""
    found = []
    with suppress(psutil.Error):
        parent = psutil.Process(pid)
        for process in [parent, *parent.children(recursive=True)]:
            words = process.cmdline()
            # A launcher has "-m accelerate…" before the module that it is to start.
            if "-m" in words and words[words.index("-m") + 1 :][:1] == ["harness.train"]:
                found.append(process)
    return found


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
