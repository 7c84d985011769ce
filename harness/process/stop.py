"""Stop requests to a training process: by signals, by the clock, or because its parent is gone."""

from __future__ import annotations

import os
import signal
import sys
import time
from contextlib import suppress
from types import FrameType
from typing import Any, ClassVar, TextIO

import psutil

from harness.process import exit_markers

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
"""USR1 is what SLURM's ``--signal`` sends by convention; HUP comes when a terminal is closed."""
REPEAT_S = 3.0
"""A signal within this time, s, after the first one repeats the same request: SLURM signals each process of a step, and
the launcher among them passes it on."""
KILLED = 128
"""Exit code of a process that stops at once: this plus the signal's number, as a shell has it."""
RESERVE_S = 10.0
"""Seconds before the time limit at which a run begins to stop, besides what its last checkpoint took."""


def handled_signals() -> tuple[signal.Signals, ...]:
    """Return the signals that ask a run to stop: `SIGNALS`, without SIGHUP where it is ignored (nohup)."""
    is_ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return tuple(number for number in SIGNALS if number is not signal.SIGHUP or not is_ignored)


class Stop:
    """Notes that the run is asked to stop; the loop then finishes its step on all processes and saves.

    - Signals: the first one asks. A second SIGINT or SIGTERM, `REPEAT_S` later or more, ends this process at once;
      what it is writing then has a temporary name that nobody reads. SIGUSR1 may come again: batch scripts send it
      until a process must have received it.
    - The clock: ``time_limit`` counts from the start of this process.
    - The parent: the command that started this process may be killed (`harness.process.parent`).

    Args:
        time_limit_s: seconds; None: no limit.

    Attributes:
        installed: a run of this process handles the signals.
        abandoned: which parent is gone, as a phrase; "" while all run.
        look: returns that phrase as of now, for a process that heard of the stop from another rank first.
        save_s: how long saving takes, s, as far as it is known.
        signal: the first signal that came.
    """

    installed: ClassVar[bool] = False
    abandoned: ClassVar[str] = ""
    look: ClassVar[staticmethod[[], str]] = staticmethod(str)

    def __init__(self, time_limit_s: float | None = None) -> None:
        self.time_limit_s = time_limit_s
        self.save_s = 0.0
        self.signal: signal.Signals | None = None
        self._received_at = 0.0
        # The limit counts from the start of the process, imports and tokenization included.
        self._started = psutil.Process().create_time()
        self._previous = {}

    @property
    def requested(self) -> bool:
        """Return True once this process has been asked to stop."""
        return self.signal is not None or self.is_late or bool(Stop.abandoned)

    @property
    def is_late(self) -> bool:
        """Return True if the time left is just enough to save."""
        if self.time_limit_s is None:
            return False
        # Twice the last save: the final one waits for the disk, too.
        return time.time() - self._started >= self.time_limit_s - RESERVE_S - 2 * self.save_s

    @property
    def reason(self) -> str:
        """Return who asked, as a phrase for people."""
        if self.signal is not None:
            return exit_markers.signal_name(exit_markers.requested_signal() or self.signal)
        if not self.is_late and (gone := Stop.abandoned or Stop.look()):
            return gone
        return f"time_limit of {self.time_limit_s:g} s" if self.is_late else "a signal to another process"

    def install(self) -> None:
        """Install the signal handlers (main thread only)."""
        for number in handled_signals():
            self._previous[number] = signal.signal(number, self._receive)
        Stop.installed = True

    def restore(self) -> None:
        """Restore the signal handlers that `install` replaced."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        Stop.installed = False

    def _receive(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.signal is None:
            self.signal, self._received_at = signal.Signals(number), now
        elif number != signal.SIGUSR1 and now - self._received_at >= REPEAT_S:
            # Not sys.exit: a second signal means now, whatever a destructor would wait for.
            os._exit(KILLED + number)


class LenientStream:
    """A text stream that drops what its terminal or pipe no longer takes.

    Args:
        stream: to write to.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write as far as somebody reads; returns the length of ``text``."""
        with suppress(OSError, ValueError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush as far as somebody reads."""
        with suppress(OSError, ValueError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def outlive_the_terminal() -> None:
    """Keep a closed terminal or a pipe without a reader from ending this process at its next line of output."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not None and not isinstance(stream, LenientStream):
            setattr(sys, name, LenientStream(stream))
