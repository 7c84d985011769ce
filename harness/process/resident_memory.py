"""The resident memory of this process: its peak, and how to reset that. Torch-free."""

from __future__ import annotations

import os
import resource
import sys
from contextlib import suppress
from pathlib import Path

RESET = Path("/proc/self/clear_refs")
"""Where Linux lets a process reset the peak of its resident memory, by writing 5 (proc(5))."""
STATUS = Path("/proc/self/status")
"""Where Linux says that peak (VmHWM, in kiB)."""


def can_reset() -> bool:
    """Return True on Linux, except in containers that forbid it."""
    return os.access(RESET, os.W_OK)


def reset_peak() -> None:
    """Let the peak begin anew at what is resident now.

    Raises:
        OSError: this system has no such thing, or forbids it.
    """
    RESET.write_text("5")


def peak_bytes() -> int:
    """Return the most bytes that were resident since the last reset, interpreter and libraries included."""
    with suppress(OSError, StopIteration):
        # Not ru_maxrss: it begins with the peak of the process that started this one, and no reset lowers that.
        line = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
