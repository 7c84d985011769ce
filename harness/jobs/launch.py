"""Start the processes of one run on this machine, pass signals on to them, and wait for their end. Torch-free."""

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
from functools import partial
from pathlib import Path
from types import FrameType
from typing import IO, Any, Self

import psutil

from harness import import_path
from harness.config.launcher import visible_devices
from harness.config.schema import RunConfig
from harness.errors import InputError
from harness.jobs import forks, outcome
from harness.jobs.outcome import RunOutcome
from harness.preparation import Prepared
from harness.process import exit_markers, gpu_environment, parent
from harness.process.stop import REPEAT_S, handled_signals, outlive_the_terminal

ACCELERATE_CONFIG = '{distributed_type: MULTI_GPU, gpu_ids: all, mixed_precision: "no"}'
"""Configuration file of `accelerate launch`: what the user's own would answer where no flag does."""


def start(prepared: Prepared, *, output: IO[Any] | None = None) -> RunOutcome:
    """Train a prepared run in processes of its own: on CPUs forks (`harness.jobs.forks`), else started programs.

    Args:
        prepared: the run.
        output: where standard output and standard error of the processes go (None: each to ours).

    Raises:
        InputError: bad input that only the run's own processes can find.
    """
    if (forked := forks.train(prepared, output=output)) is not None:
        return forked
    with tempfile.TemporaryDirectory() as scratch:
        command, extra = launch_command(prepared.config, prepared.overrides, Path(scratch))
        error = Path(scratch) / "error.json"
        began = time.time()
        markers = {exit_markers.ERROR_VARIABLE: str(error), exit_markers.FOLDER_VARIABLE: scratch}
        with SignalForwarder(Path(scratch)) as forwarder:
            # A session of its own keeps a terminal's Ctrl-C from reaching launcher and workers each by itself.
            process = subprocess.Popen(
                command,
                env={**environment(), **extra, **markers},
                stdout=output,
                stderr=output,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                preexec_fn=ignore_usr1,
            )
            forwarder.connect(partial(_signal_workers, process))
            code = process.wait()
        if (bad_input := read_error(error)) is not None:
            raise bad_input
        missing = exit_markers.missing_ranks(Path(scratch))
    return outcome.finalize(prepared.folder, code, missing, forwarder.received, began)


def read_error(path: Path) -> InputError | None:
    """Return the bad input that rank 0 wrote (`harness.process.exit_markers.write_error`); None if it wrote none."""
    try:
        return InputError(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return None


def environment() -> dict[str, str]:
    """Return the environment of a training process: it watches this one, and imports from the same places."""
    return {**os.environ, **import_path.environment(), **parent.environment()}


def launch_command(
    config: RunConfig, overrides: Sequence[str], scratch: Path
) -> tuple[list[str], dict[str, str]]:
    """Return the command line that starts the processes, and the environment variables that it needs besides ours.

    One process needs no launcher. Several get `accelerate launch` with a configuration file of ours, so that the
    user's `accelerate config` changes nothing: what no flag says, the launcher takes from a file (gpu_ids, debug,
    enable_cpu_affinity, dynamo_config, …). On CPUs the ``--cpu`` flag would start one process, silently;
    ``--multi_gpu`` with ACCELERATE_USE_CPU starts them all, over gloo.

    Args:
        config: of the run.
        overrides: of the run.
        scratch: folder for the configuration file, which must last as long as the launcher.
    """
    assert config.world_size is not None
    training = ["harness.train", *worker_argv(config, overrides)]
    if config.world_size == 1:
        return [sys.executable, "-P", "-m", *training], {}
    file = scratch / "accelerate.yaml"
    file.write_text(ACCELERATE_CONFIG)
    flags = ["--config_file", str(file), "--multi_gpu", "--num_processes", str(config.world_size)]
    flags += ["--num_machines", "1", "--main_process_port", str(free_port())]
    extra = gpu_environment.of_launcher(os.environ) if visible_devices() else cpu_environment()
    extra["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", "1")
    return [sys.executable, "-P", "-m", "accelerate.commands.launch", *flags, "-m", *training], extra


def worker_argv(config: RunConfig, overrides: Sequence[str]) -> list[str]:
    """Return the arguments of each training process: the overrides, with what was chosen here for all of them."""
    given = [word for word in overrides if word != "precision=auto"]
    keys = {word.partition("=")[0] for word in given}
    chosen = {"world_size": config.world_size, "precision": config.precision}
    return [*given, *(f"{key}={value}" for key, value in chosen.items() if key not in keys)]


def cpu_environment() -> dict[str, str]:
    """Return the environment variables of several processes on CPUs."""
    return {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}


def ignore_usr1() -> None:
    """Ignore SIGUSR1 in a new process: a launcher would die of it, and SLURM sends it to every process of a step.

    The training processes handle the signal as soon as they can.
    """
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)


class ThreadSignals:
    """Context manager that passes signals on to the runs of all threads; only the main thread can receive them.

    Attributes:
        received: the first signal that came.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._forwarders: list[SignalForwarder] = []
        self._previous = {}

    def __enter__(self) -> Self:
        global _of_threads
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._forward) for number in handled_signals()}
        _of_threads = self
        return self

    def __exit__(self, *_: object) -> None:
        global _of_threads
        _of_threads = None
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def add(self, forwarder: SignalForwarder) -> None:
        """Pass signals on to a run that is about to start, including one that came before."""
        self._forwarders.append(forwarder)
        if self.received is not None:
            forwarder.forward(self.received, None)

    def remove(self, forwarder: SignalForwarder) -> None:
        """Forget a run that has ended."""
        self._forwarders.remove(forwarder)

    def _forward(self, number: int, frame: FrameType | None) -> None:
        if self.received is None:
            self.received = signal.Signals(number)
        for forwarder in list(self._forwarders):
            forwarder.forward(number, frame)


_of_threads: ThreadSignals | None = None
"""Receives the signals for runs that other threads than the main one start."""


class SignalForwarder:
    """Context manager that passes signals on to the training processes as SIGTERM and lets them end by themselves.

    The signals go to the workers and not to the launcher: torch's elastic agent would print a traceback, and after
    30 s kill what has not ended, but it accepts workers that end by themselves with code 0. A second signal,
    `REPEAT_S` after the first or later, kills the workers.

    Args:
        markers: folder (`exit_markers`) in which the first signal is written down.

    Attributes:
        received: the first signal that came.
    """

    def __init__(self, markers: Path) -> None:
        self._markers = markers
        self.received: signal.Signals | None = None
        self._received_at = 0.0
        self._send: Callable[[signal.Signals], None] | None = None
        self._previous = {}
        self._source: ThreadSignals | None = None

    def __enter__(self) -> Self:
        # Other threads may not set handlers. Without `ThreadSignals` (in a notebook, a server) signals end this process
        # as usual.
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self.forward) for number in handled_signals()}
        elif _of_threads is not None:
            self._source = _of_threads
            self._source.add(self)
        return self

    def __exit__(self, *_: object) -> None:
        if self._source is not None:
            self._source.remove(self)
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def connect(self, send: Callable[[signal.Signals], None]) -> None:
        """Pass signals on through ``send``, including one that came before the processes existed."""
        self._send = send
        if self.received is not None:
            send(signal.SIGTERM)

    def forward(self, number: int, frame: FrameType | None) -> None:
        """Ask the processes of the run to end; kill them at a repetition."""
        passed_on = signal.SIGTERM
        if self.received is None:
            self.received, self._received_at = signal.Signals(number), time.monotonic()
            exit_markers.note_signal(self._markers, self.received)
            if self.received is signal.SIGHUP:
                outlive_the_terminal()
        elif time.monotonic() - self._received_at >= REPEAT_S:
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
    """Return the processes at or below ``pid`` that run `harness.train`; none while they are starting."""
    workers = []
    with suppress(psutil.Error):
        root = psutil.Process(pid)
        for process in [root, *root.children(recursive=True)]:
            argv = process.cmdline()
            # "-P" or "-u" may come first. A launcher has "-m accelerate…" before the module that it starts.
            if "-m" in argv and argv[argv.index("-m") + 1 :][:1] == ["harness.train"]:
                workers.append(process)
    return workers


def free_port() -> int:
    """Return a TCP port of this machine that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
