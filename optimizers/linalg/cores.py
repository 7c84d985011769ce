"""A batch of factorizations over the cores of a CPU.

LAPACK takes a batch matrix after matrix, and its own threads gain little on a small one: half of an
eigendecomposition is matrix-vector work, and the threads wait for each other at every step of it. Here each core
takes a share of the batch and factorizes it alone. A matrix then goes through exactly the instructions of one
thread, so its factors have the same bits whatever the number of threads.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import pairwise

import torch

# Measured on eigendecompositions: below this size handing over costs what it gains.
SMALLEST = 64
# Shares per thread: the second one evens out what else the machine does meanwhile.
_SHARES = 2


class _Team:
    """Persistent threads, in each of which torch computes on one core.

    They wait without spinning, and Python joins them at exit.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._executor = ThreadPoolExecutor(size, thread_name_prefix="optbench-lapack")
        everyone = threading.Barrier(size + 1)
        try:
            for _ in range(size):
                self._executor.submit(_on_one_core, everyone)
            everyone.wait()
        except BaseException:
            everyone.abort()  # else those that did start would wait for the others for ever
            raise
        # What a thread sets for itself, torch also takes as the start value of threads to come: take that back.
        torch.set_num_threads(torch.get_num_threads())

    def submit(self, call: Callable[[slice], object], share: slice) -> Future[object]:
        """Run `call(share)` in one of the threads."""
        return self._executor.submit(call, share)

    def dismiss(self) -> None:
        """Let the threads end once their work is done."""
        self._executor.shutdown(wait=False)


def _on_one_core(everyone: threading.Barrier) -> None:
    # The first question in a thread sets its number from the process's; asked later it would undo the next line.
    torch.get_num_threads()
    torch.set_num_threads(1)
    everyone.wait()


_lock = threading.Lock()
_team: _Team | None = None


def _after_fork() -> None:
    # A child has none of its parent's threads, and perhaps a lock that one of them held.
    global _lock, _team
    _lock, _team = threading.Lock(), None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def _submitted(call: Callable[[slice], object], shares: list[slice], size: int) -> list[Future[object]]:
    global _team
    with _lock:  # also while submitting: another thread may want another team meanwhile
        if _team is None or _team.size != size:
            if _team is not None:
                _team.dismiss()
            _team = _Team(size)
        return [_team.submit(call, share) for share in shares]


def worth_sharing(count: int, side: int) -> bool:
    """Whether `over_cores` gains anything on `count` matrices of this size.

    With far fewer matrices than threads LAPACK's own threads do better.
    """
    threads = torch.get_num_threads()
    return threads > 1 and count > 1 and 4 * count >= threads and side >= SMALLEST


def over_cores(call: Callable[[slice], object], count: int) -> None:
    """`call` on contiguous slices that make up range(count), on as many cores as torch has threads here.

    `call` works on tensors of its own share. In its threads inference mode is as here, all else is torch's
    default: autograd on, autocast and dispatch modes off.

    Raises:
        what a `call` raised, after all are done.
    """
    inference = torch.is_inference_mode_enabled()

    def in_thread(share: slice) -> None:
        with torch.inference_mode(inference):
            call(share)

    size = torch.get_num_threads()
    parts = min(_SHARES * size, count)
    bounds = [count * i // parts for i in range(parts + 1)]
    futures = _submitted(in_thread, [slice(a, b) for a, b in pairwise(bounds)], size)
    failures = [future.exception() for future in futures]
    for failure in failures:
        if failure is not None:
            raise failure
