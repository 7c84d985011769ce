"""Processes that train several small runs one after the other, because starting them takes longer than training.

    with warm.sharing(output):
        for run in runs:
            launch.start(run)          # in the shared processes where `is_shareable`, else in its own

Each run joins a process group of its own, and `harness.jobs.warm_worker` restores its process afterwards, so a run gets
the same weights as in a fresh process. After anything but an ordinary end the processes are replaced. Torch-free.
"""

from __future__ import annotations

import ctypes
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import Pipe
from multiprocessing.connection import wait
from pathlib import Path
from typing import IO, Any, NamedTuple

from harness.config.launcher import visible_devices
from harness.config.model_facts import parameter_count
from harness.config.schema import RunConfig
from harness.jobs import launch, outcome
from harness.jobs.outcome import RunOutcome
from harness.preparation import Prepared
from harness.process import exit_markers, resident_memory
from optimizers import presets

ENGINES = ("single", "ddp", "fsdp2", "hsdp")
"""DeepSpeed keeps its process groups in module globals: its runs get processes of their own."""
MOST_FLOPS = 1e14
"""Most FLOPs of a run that shares processes, about half an hour on two CPU cores; longer runs hardly notice a start."""
GRACE_S = 10.0
"""Time, s, in which the other processes must end by themselves once one has died; then they get SIGTERM."""
KILL_S = 30.0
"""Time, s, from SIGTERM to SIGKILL."""


class Kind(NamedTuple):
    """Settings that runs must have in common to share processes."""

    world_size: int
    engine: str
    precision: str
    threads: int | None


def is_shareable(config: RunConfig) -> bool:
    """Return True if processes that trained another run before can train this one with the same record.

    Not on GPUs, nor where the peak of the memory cannot be reset; not where code of others (plug-ins), torch.compile
    or the profiler leave traces in a process, nor with a time limit, which counts from a process' start.
    """
    training_flops = 6.0 * parameter_count(config.model) * config.steps * config.batch_size * config.seq_len
    return (
        config.engine.name in ENGINES
        and config.optimizer.target is None
        and config.optimizer.name in presets.PRESETS
        and not config.model.compile
        and not config.profile
        and config.time_limit is None
        and training_flops <= MOST_FLOPS
        and not visible_devices()
        and resident_memory.can_reset()
        and hasattr(ctypes.CDLL(None), "malloc_trim")
    )


@contextmanager
def sharing(output: IO[Any] | None = None) -> Iterator[None]:
    """Let the runs that `launch.start` is called for inside share processes, as far as they can.

    Args:
        output: where standard output and standard error of the shared processes go (None: each to ours).
    """
    shared = _Shared(output)
    token = launch.SHARED.set(shared.train)
    try:
        yield
    finally:
        launch.SHARED.reset(token)
        shared.close()


class _Shared:
    """The shared processes: one group at a time, which a run of another kind replaces."""

    def __init__(self, output: IO[Any] | None) -> None:
        self._output = output
        self._kind: Kind | None = None
        self._group: _Group | None = None

    def train(self, prepared: Prepared) -> RunOutcome | None:
        """Train a run, or return None if it needs processes of its own."""
        config = prepared.config
        if not is_shareable(config):
            return None
        assert config.world_size is not None
        kind = Kind(config.world_size, config.engine.name, config.precision, config.engine.threads)
        if self._group is None or not self._group.is_usable or self._kind != kind:
            self.close()
            self._kind, self._group = kind, _Group(kind.world_size, self._output)
        return self._group.train(prepared)

    def close(self) -> None:
        """End the shared processes."""
        if self._group is not None:
            self._group.close()
        self._group = None


class _Group:
    """A group of processes that receive runs and send replies through pipes."""

    def __init__(self, world_size: int, output: IO[Any] | None) -> None:
        self._is_clean = True
        self._pipes: list[Any] = []
        self._processes: list[subprocess.Popen[bytes]] = []
        for rank in range(world_size):
            ours, theirs = Pipe()
            self._processes.append(
                subprocess.Popen(
                    [sys.executable, "-P", "-m", "harness.jobs.warm_worker", str(theirs.fileno())],
                    env={**launch.environment(), **_environment(rank, world_size)},
                    stdout=output,
                    stderr=output,
                    stdin=subprocess.DEVNULL,
                    pass_fds=[theirs.fileno()],
                    # As in `launch.start`: a terminal's Ctrl-C is for us, who pass it on.
                    start_new_session=True,
                    preexec_fn=launch.ignore_usr1,
                )
            )
            # Ours alone would stay open when the process dies.
            theirs.close()
            self._pipes.append(ours)

    @property
    def is_usable(self) -> bool:
        """Return True if all processes wait for a run."""
        return self._is_clean and all(process.poll() is None for process in self._processes)

    def train(self, prepared: Prepared) -> RunOutcome:
        """Train a run as `launch.start` does.

        Raises:
            InputError: bad input that only the run's own processes can find.
        """
        with tempfile.TemporaryDirectory() as scratch:
            error = Path(scratch) / "error.json"
            environment = {
                exit_markers.ERROR_VARIABLE: str(error),
                exit_markers.FOLDER_VARIABLE: scratch,
                "MASTER_PORT": str(launch.free_port()),
            }
            began = time.time()
            with launch.SignalForwarder(Path(scratch)) as forwarder:
                self._send((list(launch.worker_argv(prepared.config, prepared.overrides)), environment))
                forwarder.connect(self._signal)
                replies = self._replies()
            codes = [reply[0] for reply in replies]
            self._is_clean = all(is_clean for _, is_clean in replies)
            if not self._is_clean:
                self.close()
            if (bad_input := launch.read_error(error)) is not None:
                raise bad_input
            missing = exit_markers.missing_ranks(Path(scratch))
        code = next((code for code in codes if code), 0)
        return outcome.finalize(prepared.folder, code, missing, forwarder.received, began)

    def close(self) -> None:
        """End the processes: waiting ones end by themselves, the others are killed."""
        for pipe in self._pipes:
            pipe.close()
        if not self._is_clean:
            self._signal(signal.SIGKILL)
        self._is_clean = False
        for process in self._processes:
            try:
                process.wait(GRACE_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _send(self, job: tuple[Sequence[str], Mapping[str, str]]) -> None:
        for pipe in self._pipes:
            # A process that died before is noticed by its missing reply.
            with suppress(OSError):
                pipe.send(job)

    def _replies(self) -> list[tuple[int, bool]]:
        """Return (exit code, True if the process can train another run) of each rank.

        If one process died, the others only wait for it: they are asked to end, then killed, as a launcher does.
        """
        replies: dict[int, tuple[int, bool]] = {}
        died_at, terminated = None, False
        while len(replies) < len(self._pipes):
            waiting = [pipe for rank, pipe in enumerate(self._pipes) if rank not in replies]
            for pipe in wait(waiting, timeout=1.0):
                rank = self._pipes.index(pipe)
                try:
                    replies[rank] = self._pipes[rank].recv()
                except (EOFError, OSError):
                    replies[rank] = (self._processes[rank].wait(), False)
                    died_at = died_at or time.monotonic()
            if died_at is None:
                continue
            late = time.monotonic() - died_at
            if late >= GRACE_S and not terminated:
                self._signal(signal.SIGTERM)
                terminated = True
            elif late >= GRACE_S + KILL_S:
                self._signal(signal.SIGKILL)
        return [replies[rank] for rank in range(len(self._pipes))]

    def _signal(self, number: signal.Signals) -> None:
        for process in self._processes:
            process.send_signal(number)


def _environment(rank: int, world_size: int) -> dict[str, str]:
    """Return the variables that a launcher gives each of several processes; {} for a single one."""
    if world_size == 1:
        return {}
    return {
        **launch.cpu_environment(),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
    }
