"""Wait for a device without blocking the interpreter. Torch-free."""

from __future__ import annotations

import time
from collections.abc import Callable

SHORTEST_S, LONGEST_S = 20e-6, 1e-3
"""Sleep between two questions: it doubles from the one to the other."""


class WaitedTooLong(RuntimeError):
    """A device did not finish in time."""


def wait_until(is_done: Callable[[], bool], timeout_s: float, what: str) -> None:
    """Ask until the answer is True.

    A blocking wait of the driver would hold back signal handlers, and with them a second Ctrl-C, for as long as a
    collective hangs.

    Args:
        is_done: such as ``event.query`` of a CUDA event.
        timeout_s: longest wait, s; infinite: none.
        what: is waited for, as the end of a sentence.

    Raises:
        WaitedTooLong: it was not done in time.
    """
    end, pause = time.monotonic() + timeout_s, SHORTEST_S
    while not is_done():
        if time.monotonic() >= end:
            raise WaitedTooLong(f"waited {timeout_s:g} s (engine.timeout_s) for {what}")
        time.sleep(pause)
        pause = min(2 * pause, LONGEST_S)
