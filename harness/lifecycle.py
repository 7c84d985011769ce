"""Signals: how a run is asked to stop."""

from __future__ import annotations

import signal
from types import FrameType


class StopSignal:
    """Notes SIGINT and SIGTERM instead of dying of them; the loop then finishes its step on all processes.

    Repeats are ignored: a terminal's Ctrl-C reaches the workers twice, once from the terminal and once from
    the launcher that passes it on.
    """

    def __init__(self) -> None:
        self.requested = False
        self._previous = {}

    def install(self) -> None:
        """Take the handlers over (main thread only)."""
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._note)

    def restore(self) -> None:
        """Give the handlers back."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
