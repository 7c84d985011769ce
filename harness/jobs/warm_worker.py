"""A process of `harness.jobs.warm`: trains the runs that come through its pipe and restores itself after each one.

python -m harness.jobs.warm_worker FILE_DESCRIPTOR
"""

from __future__ import annotations

import ctypes
import gc
import os
import random
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any

from harness import worker
from harness.process import parent, resident_memory
from harness.process.heartbeat import BEAT_S
from harness.process.leaving import leave_after
from harness.process.stop import SIGNALS, outlive_the_terminal


def main(argv: Sequence[str]) -> int:
    """Train runs until the pipe is closed, and return the exit code.

    A run that raises an exception ends this process, because its threads and process group are in an unknown state.
    """
    pipe = Connection(int(argv[0]))
    parent.watch()
    warm_up()
    before = ProcessState()
    while True:
        try:
            words, environment = pipe.recv()
        except EOFError:
            return 0
        before.reset_peak()
        os.environ.update(environment)
        try:
            with warnings.catch_warnings():
                code = worker.main(words)
        except BaseException:
            traceback.print_exc()
            return 1
        sys.stdout.flush()
        sys.stderr.flush()
        pipe.send((code, code in worker.EXIT_CODES.values() and before.restore()))


def warm_up() -> None:
    """Load what torch loads at first use, so that the first run's steps take no longer than those of later runs."""
    import torch

    state = torch.get_rng_state()
    layer = torch.nn.Linear(64, 64)
    optimizer = torch.optim.AdamW(layer.parameters())
    torch.nn.functional.cross_entropy(layer(torch.randn(64, 64)), torch.arange(64)).backward()
    optimizer.step()
    for decompose in (torch.linalg.svd, torch.linalg.qr, torch.linalg.eigh, torch.linalg.inv):
        decompose(torch.eye(64) + torch.ones(64, 64))
    torch.set_rng_state(state)


class ProcessState:
    """Process-wide state before the first run: environment, signals, threads, random generators, torch settings."""

    def __init__(self) -> None:
        import numpy as np
        import torch

        self._environment = dict(os.environ)
        self._folder = os.getcwd()
        self._handlers = {number: signal.getsignal(number) for number in SIGNALS}
        self._threads = set(threading.enumerate())
        self._random: Any = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
        self._torch = self._settings()

    def restore(self) -> bool:
        """Restore the state; return False if something of the run is left, after which the process must be replaced."""
        import numpy as np
        import torch
        import torch.distributed as dist
        from accelerate import state

        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        os.environ.clear()
        os.environ.update(self._environment)
        os.chdir(self._folder)
        # The engine left the process group; Accelerate's singletons still describe it.
        state.AcceleratorState._reset_state(reset_partial_state=True)
        state.GradientState._reset_state()
        python, numpy, generator = self._random
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
        torch.set_rng_state(generator)
        self._release_memory()
        return not dist.is_initialized() and self._settings() == self._torch and self._has_quiet_threads()

    def reset_peak(self) -> None:
        """Reset the peak of the resident memory, so that a run's figure is its own."""
        self._release_memory()
        resident_memory.reset_peak()

    @staticmethod
    def _release_memory() -> None:
        gc.collect()
        # Freed blocks stay in glibc's arenas, and the next run's peak would count them.
        ctypes.CDLL(None).malloc_trim(0)

    @staticmethod
    def _settings() -> tuple[Any, ...]:
        """Return the global settings of torch that change results."""
        import torch

        return (
            torch.get_default_dtype(),
            torch.is_grad_enabled(),
            torch.are_deterministic_algorithms_enabled(),
            torch.get_float32_matmul_precision(),
            torch.nn.functional.linear,
        )

    def _has_quiet_threads(self) -> bool:
        """Wait for the run's threads; return False if one that is not a daemon goes on."""
        end = time.monotonic() + 2 * BEAT_S
        while any(not t.daemon for t in set(threading.enumerate()) - self._threads):
            if time.monotonic() > end:
                return False
            time.sleep(0.05)
        return True


if __name__ == "__main__":
    outlive_the_terminal()
    leave_after(lambda: main(sys.argv[1:]))
