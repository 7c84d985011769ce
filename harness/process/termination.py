"""End a process that works for a command with it, and let SIGTERM end the command as Ctrl-C does. Torch-free."""

from __future__ import annotations

import ctypes
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

from harness.process.stop import KILLED

_SET_DEATH_SIGNAL = 1
"""PR_SET_PDEATHSIG of Linux."""


def die_with_parent() -> None:
    """Let the kernel kill this process once the thread that forked it ends, whatever it computes; on Linux only."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_SET_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)


@contextmanager
def terminable() -> Iterator[None]:
    """Raise SystemExit at the first SIGTERM, so that what the enclosed code opened is closed; a second one kills.

    Only the main thread can do this; in another one nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, _frame: FrameType | None) -> NoReturn:
        signal.signal(number, signal.SIG_DFL)
        raise SystemExit(KILLED + number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
