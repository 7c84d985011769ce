"""Training processes that start in a tenth of a second: real processes, forked from one that has imported torch.

Everything else is as a launcher starts them: `harness.train.main` with the launcher's environment variables.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.distributed.pool import PRELOADED

CONTEXT = multiprocessing.get_context("forkserver")
# One server per process: that of the rank pools, too.
CONTEXT.set_forkserver_preload(list(PRELOADED))


class Training:
    """The processes of one attempt at a run.

    Args:
        words: configuration.
        world_size: processes.
        output: file that their standard error is appended to.
        limits: `resource` limits by name, e.g. {"RLIMIT_FSIZE": 1000}.
        environment: variables to set; theirs are those of the server that they are forked from.
    """

    def __init__(
        self,
        words: Sequence[str],
        world_size: int,
        output: Path,
        limits: dict[str, int] | None = None,
        environment: dict[str, str] | None = None,
    ) -> None:
        port = _free_port()
        self.processes = [
            CONTEXT.Process(
                target=_train,
                args=(list(words), rank, world_size, port, str(output), limits or {}, environment or {}),
            )
            for rank in range(world_size)
        ]
        self.output = output
        for process in self.processes:
            process.start()

    def kill(self, number: signal.Signals, ranks: Sequence[int] | None = None) -> None:
        """Send a signal to all processes, or to some."""
        for rank in range(len(self.processes)) if ranks is None else ranks:
            pid = self.processes[rank].pid
            if pid is not None and self.processes[rank].is_alive():
                os.kill(pid, number)

    def wait(self, timeout_s: float = 60) -> list[int | None]:
        """Exit codes once all have ended; negative: by that signal."""
        until = time.monotonic() + timeout_s
        for process in self.processes:
            process.join(max(0.0, until - time.monotonic()))
        codes = [process.exitcode for process in self.processes]
        if None in codes:
            self.kill(signal.SIGKILL)
            raise TimeoutError(f"still running after {timeout_s} s: {codes}\n{self.said()}")
        return codes

    def said(self) -> str:
        """What they wrote."""
        return self.output.read_text() if self.output.exists() else ""


def trained(
    words: Sequence[str], world_size: int, output: Path, *, timeout_s: float = 60, **more: Any
) -> list[int | None]:
    """Run one attempt to its end."""
    return Training(words, world_size, output, **more).wait(timeout_s)


def import_once() -> None:
    """Return once the process that others are forked from has imported all: for tests that measure time."""
    process = CONTEXT.Process(target=int)
    process.start()
    process.join()


def _train(
    words: list[str],
    rank: int,
    world_size: int,
    port: int,
    output: str,
    limits: dict[str, int],
    environment: dict[str, str],
) -> None:
    import resource

    handle = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, sys.stdout.fileno())
    os.dup2(handle, sys.stderr.fileno())
    for name, value in limits.items():
        number = getattr(resource, name)
        resource.setrlimit(number, (value, resource.getrlimit(number)[1]))
    # Of a test that used W&B before the server was forked: a service that may be gone.
    os.environ.pop("WANDB_SERVICE", None)
    os.environ.update(ACCELERATE_USE_CPU="true", OMP_NUM_THREADS="1", **environment)
    if world_size > 1:
        os.environ.update(
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(world_size),
            LOCAL_WORLD_SIZE=str(world_size),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
        )
    from harness.train import main

    code = main(words)
    sys.stderr.flush()
    # Not through multiprocessing's own end, which would wait for what the run left running.
    os._exit(code)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
