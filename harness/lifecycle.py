"""How a run is asked to stop, by signals and by the clock, and how others see that its processes live."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any, ClassVar, TextIO

import psutil

from harness.jobs import last_words
from harness.record import readers
from harness.record.readers import HEARTBEAT, Beat

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
"""USR1 is what SLURM's ``--signal`` sends by convention; HUP comes when a terminal is closed."""
REPEAT_S = 3.0
"""A signal within this time after the first one is the same wish again: SLURM signals each process of a step, the
launcher among them, which passes it on."""
KILLED = 128
"""Exit code of a process that stops at once: this plus the signal's number, as a shell has it."""
RESERVE_S = 10.0
"""Seconds before the time limit at which a run begins to stop, besides what its last checkpoint took."""
BEAT_S = 2.0
SILENT = "has given no sign of life"
_HARNESS = Path(__file__).parent


def handled_signals() -> tuple[signal.Signals, ...]:
    """Return the signals that ask a run to stop: `SIGNALS`, without SIGHUP where it is ignored (nohup)."""
    is_ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return tuple(number for number in SIGNALS if number is not signal.SIGHUP or not is_ignored)


class Stop:
    """Notes that the run is asked to end; the loop then finishes its step on all processes and saves.

    Signals: the first one asks, a second SIGINT or SIGTERM (`REPEAT_S` later or more) ends this process at once;
    whatever it is writing then has a name that nobody reads. SIGUSR1 may come again: batch scripts send it until it
    must have been heard. The clock: ``time_limit`` counts from the start of this process.

    The command that started this process may end without a word (`harness.jobs.parent`), which asks, too.

    Args:
        time_limit_s: seconds; None: none.

    Attributes:
        installed: a run of this process takes the signals.
        abandoned: that the command is gone, in words; "" while it is there.
        look: finds that out now, where another process saw it first.
    """

    installed: ClassVar[bool] = False
    abandoned: ClassVar[str] = ""
    look: ClassVar[staticmethod[[], str]] = staticmethod(str)

    def __init__(self, time_limit_s: float | None = None) -> None:
        self.time_limit_s = time_limit_s
        self.save_s = 0.0
        """How long saving takes, as far as it is known."""
        self.signal: signal.Signals | None = None
        """The first one that came."""
        self._noted_at = 0.0
        self._started = psutil.Process().create_time()
        self._previous = {}

    @property
    def requested(self) -> bool:
        """Whether this process has been asked."""
        return self.signal is not None or self.is_late or bool(Stop.abandoned)

    @property
    def is_late(self) -> bool:
        """Whether there is just the time left to save."""
        if self.time_limit_s is None:
            return False
        return time.time() - self._started >= self.time_limit_s - RESERVE_S - 2 * self.save_s

    @property
    def reason(self) -> str:
        """Who asked, for people."""
        if self.signal is not None:
            return last_words.describe(last_words.asked() or self.signal)
        if not self.is_late and (gone := Stop.abandoned or Stop.look()):
            return gone
        return f"time_limit of {self.time_limit_s:g} s" if self.is_late else "a signal to another process"

    def install(self) -> None:
        """Take the handlers over (main thread only)."""
        for number in handled_signals():
            self._previous[number] = signal.signal(number, self._note)
        Stop.installed = True

    def restore(self) -> None:
        """Give the handlers back."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        Stop.installed = False

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.signal is None:
            self.signal, self._noted_at = signal.Signals(number), now
        elif number != signal.SIGUSR1 and now - self._noted_at >= REPEAT_S:
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


class Heartbeat:
    """A file per process that says, every `BEAT_S` seconds, which step it is in and which line it executes.

    A thread writes it, so it stops where the process was stopped or killed, and shows the place where it hangs. A
    folder that cannot be written stops nothing.

    Args:
        folder: the run folder.
        rank: of this process.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        self._path = folder / HEARTBEAT / f"rank_{rank:05d}.json"
        self._main = threading.main_thread().ident
        self._ended = threading.Event()
        self.step = 0
        """That the process is in; set by the loop."""
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """End; the file stays."""
        self._ended.set()

    def _beat(self) -> None:
        while True:
            try:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                # Not synced to the disk: it is of no use after a crash of the machine.
                part = self._path.with_suffix(".part")
                part.write_text(json.dumps({"step": self.step, "where": self._where()}))
                part.replace(self._path)
            except OSError:
                return
            if self._ended.wait(BEAT_S):
                return

    def _where(self) -> str:
        frame = sys._current_frames().get(self._main or 0)
        while frame is not None and not _is_ours(frame.f_code.co_filename):
            frame = frame.f_back
        if frame is None:
            return ""
        path = Path(frame.f_code.co_filename)
        return f"{path.parent.name}/{path.name}:{frame.f_lineno} {frame.f_code.co_name}"


def _is_ours(filename: str) -> bool:
    return Path(filename).parent.is_relative_to(_HARNESS)


def heartbeats(folder: Path) -> dict[int, Beat]:
    """Rank → last sign of life, of all processes of a run; files that cannot be read are left out."""
    return readers.heartbeats(folder)[0]


def silent_ranks(folder: Path) -> str:
    """A line about processes that gave no sign of life while others did: stopped, killed, or on a dead node. Empty
    where there are none."""
    beats = heartbeats(folder)
    youngest = min((beat.age_s for beat in beats.values()), default=0.0)
    late = {rank: beat for rank, beat in sorted(beats.items()) if beat.age_s > youngest + 2 * BEAT_S}
    return "; ".join(
        f"rank {rank} {SILENT} for {beat.age_s:.0f} s, since step {beat.step} ({beat.where})"
        for rank, beat in late.items()
    )
