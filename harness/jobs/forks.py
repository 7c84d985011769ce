"""Start training processes on CPUs in a moment: as forks of a process that has imported torch and transformers.

    forks.warm_up()                # optional: begin to import while the run is still being checked
    outcome = forks.train(run)     # None: this run needs a launcher

The imports take most of the time to the first step. One server (`harness.jobs.fork_server`) does them once for all
processes of a run, and for all runs of a command. Torch-free.
"""

from __future__ import annotations

import atexit
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import wait
from multiprocessing.reduction import send_handle
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from harness import import_path
from harness.config import gpus

if TYPE_CHECKING:
    from harness.jobs.outcome import RunOutcome
    from harness.preparation import Prepared

GRACE_S = 10.0
"""Time, s, in which the other processes must end by themselves once one has died; then they get SIGTERM."""
KILL_S = 30.0
"""Time, s, from SIGTERM to SIGKILL."""
_PER_RUN = ("OPTBENCH_", "WANDB_", "SLURM_", "PYTEST_", "PWD", "OLDPWD", "COLUMNS", "LINES")
"""Environment variables, by their beginnings, that nothing reads while it is imported: each run brings its own."""
_idle: list[_Server] = []


class ServerLost(Exception):
    """The server ended before it had forked the processes of a run."""


def is_possible() -> bool:
    """Return True if processes can be forks: on Linux, without GPUs, whose drivers and libraries start threads."""
    from harness.config.launcher import visible_devices

    return sys.platform == "linux" and not visible_devices()


def warm_up() -> None:
    """Start a server, so that it imports while this process checks the run; not where there is a GPU."""
    if sys.platform == "linux" and not _idle and not gpus.present():
        _idle.append(_Server())


def train(prepared: Prepared, *, output: IO[Any] | None = None) -> RunOutcome | None:
    """Train a run as `harness.jobs.launch.start` does, or return None if its processes can't be forks.

    Raises:
        InputError: bad input that only the run's own processes can find.
    """
    if not is_possible():
        return None
    server = _take()
    try:
        outcome = server.train(prepared, output)
    except ServerLost:
        server.close()
        return None
    except BaseException:
        # Also InputError: the processes have ended, but is_usable would not know it after another error.
        server.close()
        raise
    _idle.append(server)
    return outcome


def close() -> None:
    """End the servers that wait for a run."""
    while _idle:
        _idle.pop().close()


# An import that goes on would keep the pipes of this command's output open.
atexit.register(close)


def _take() -> _Server:
    """Return a server that no run uses, whose imports saw the environment of now."""
    while True:
        try:
            server = _idle.pop()
        except IndexError:
            # Asked for and not looked up before: several threads may take servers at once.
            return _Server()
        if server.is_usable():
            return server
        server.close()


class _Server:
    """A server process, and this end of its pipe."""

    def __init__(self) -> None:
        self._owner, self._imported_under = os.getpid(), _import_environment()
        ours, theirs = Pipe()
        self._pipe: Any = ours
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "harness.jobs.fork_server", str(theirs.fileno())],
            # The engine sets the threads of a run. Libraries that start theirs while they are loaded must not.
            env={**os.environ, **import_path.environment(), "OMP_NUM_THREADS": "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=[theirs.fileno()],
            # A terminal's Ctrl-C is for the command, which passes it on.
            start_new_session=True,
        )
        theirs.close()

    def is_usable(self) -> bool:
        """Return True if the server waits for a run of this process."""
        return (
            self._owner == os.getpid()
            and self._process.poll() is None
            and self._imported_under == _import_environment()
        )

    def train(self, prepared: Prepared, output: IO[Any] | None) -> RunOutcome:
        """Train a run in forks.

        Raises:
            ServerLost: nothing was started.
            InputError: bad input that only the run's own processes can find.
        """
        from harness.jobs import launch, outcome
        from harness.process import exit_markers

        world_size = prepared.config.world_size
        assert world_size is not None
        words = launch.worker_argv(prepared.config, prepared.overrides)
        with tempfile.TemporaryDirectory() as scratch:
            error = Path(scratch) / "error.json"
            markers = {exit_markers.ERROR_VARIABLE: str(error), exit_markers.FOLDER_VARIABLE: scratch}
            shared = {**launch.environment(), **markers}
            port = launch.free_port()
            environment = [{**shared, **_of_rank(rank, world_size, port)} for rank in range(world_size)]
            began = time.time()
            with launch.SignalForwarder(Path(scratch)) as forwarder:
                self._start((words, environment, os.getcwd()), output)
                forwarder.connect(self._signal)
                codes = self._codes(world_size)
            if (bad_input := launch.read_error(error)) is not None:
                raise bad_input
            missing = exit_markers.missing_ranks(Path(scratch))
        code = next((code for code in codes if code), 0)
        return outcome.finalize(prepared.folder, code, missing, forwarder.received, began)

    def close(self) -> None:
        """End the server at once, if this process started it; forks that are left watch this process."""
        self._pipe.close()
        if self._owner == os.getpid():
            self._process.kill()
            self._process.wait()

    def _start(
        self, job: tuple[Sequence[str], Sequence[Mapping[str, str]], str], output: IO[Any] | None
    ) -> None:
        streams = [output.fileno()] * 2 if output is not None else [1, 2]
        try:
            self._pipe.send(job)
            with open(os.devnull, "w") as nothing:
                for stream in streams:
                    # Of a command without output (``>&-``), Python may have given the number to something else.
                    is_open = output is not None or (sys.__stdout__, sys.__stderr__)[stream - 1] is not None
                    send_handle(self._pipe, stream if is_open else nothing.fileno(), self._process.pid)
            self._pids = self._pipe.recv()
        except (EOFError, OSError) as error:
            raise ServerLost from error

    def _codes(self, world_size: int) -> list[int]:
        """Return the exit code of each rank.

        If one process died, the others only wait for it: they are asked to end, then killed, as a launcher does.
        """
        codes: dict[int, int] = {}
        failed_at, terminated = None, False
        while len(codes) < world_size:
            if wait([self._pipe], timeout=None if failed_at is None else 1.0):
                try:
                    rank, code = self._pipe.recv()
                except (EOFError, OSError):
                    return self._orphaned(world_size)
                codes[rank] = code
                if code != 0:
                    failed_at = failed_at or time.monotonic()
            late = 0.0 if failed_at is None else time.monotonic() - failed_at
            if late >= GRACE_S and not terminated:
                self._signal(signal.SIGTERM)
                terminated = True
            elif late >= GRACE_S + KILL_S:
                self._signal(signal.SIGKILL)
        return [codes[rank] for rank in range(world_size)]

    def _orphaned(self, world_size: int) -> list[int]:
        """End the processes of a server that was killed, and return codes for them."""
        for pid in self._pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return [-signal.SIGKILL] * world_size

    def _signal(self, number: int) -> None:
        with suppress(OSError):
            self._pipe.send(int(number))


def _import_environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith(_PER_RUN)}


def _of_rank(rank: int, world_size: int, port: int) -> dict[str, str]:
    """Return the variables that a launcher gives each of several processes; {} for a single one."""
    from harness.jobs import launch

    if world_size == 1:
        return {}
    return {
        **launch.cpu_environment(),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
