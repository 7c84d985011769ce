"""Where the time of a step goes, measured without making the host wait for the device."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.profiler import record_function


class Clock:
    """Accumulates seconds per named part between two reads.

    On a CPU the parts are host time. On CUDA they are pairs of events on the current stream, added up when
    `read` waits for the device, which is the only wait.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._seconds: dict[str, float] = defaultdict(float)
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        self._last_read = time.perf_counter()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count the enclosed work as ``name``, which a profiler shows, too."""
        with record_function(name):
            yield from self._timed(name)

    def _timed(self, name: str) -> Iterator[None]:
        if self._device.type == "cuda":
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            yield
            end.record()
            self._events.append((name, begin, end))
        else:
            begin = time.perf_counter()
            yield
            self._seconds[name] += time.perf_counter() - begin

    def move(self, source: str, target: str, seconds: float) -> None:
        """Count ``seconds`` that were measured inside of ``source`` as ``target`` instead."""
        self._seconds[source] -= seconds
        self._seconds[target] += seconds

    def read(self) -> dict[str, float]:
        """Seconds per part since the last read, and "total", the wall-clock time between the reads. Waits."""
        seconds = self.peek()
        self._seconds, self._last_read = defaultdict(float), time.perf_counter()
        return seconds

    def peek(self) -> dict[str, float]:
        """What `read` would give, without beginning anew. Waits."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            for name, begin, end in self._events:
                self._seconds[name] += begin.elapsed_time(end) * 1e-3
            self._events = []
        return {**self._seconds, "total": time.perf_counter() - self._last_read}

    def resume(self, seconds: dict[str, float]) -> None:
        """Go on counting from what `peek` gave in an earlier process, beginning now."""
        parts = {name: value for name, value in seconds.items() if name != "total"}
        self._seconds, self._events = defaultdict(float, parts), []
        self._last_read = time.perf_counter() - seconds["total"]
