"""Where the time of a step goes: the clock of every run, and with ``profile=true`` a trace of a few steps."""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function, schedule

from harness.files import atomic

WAIT, WARM, ACTIVE = 2, 1, 3
"""Steps that are left alone (allocation, compilation), that warm the profiler up, and that are recorded."""
_ROWS = 40


class Clock:
    """Accumulates seconds per named part between two reads.

    On a CPU the parts are host time. On CUDA they are pairs of events on the current stream. `read` waits for the
    device, which is the only wait, and adds them up; before, pairs that the device has passed are added up and used
    again, so that their number does not grow with the steps between two reads.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._seconds: dict[str, float] = defaultdict(float)
        self._pending: deque[tuple[str, torch.cuda.Event, torch.cuda.Event]] = deque()
        self._free: list[torch.cuda.Event] = []
        self._last_read = time.perf_counter()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count the enclosed work as ``name``, which a profiler shows, too."""
        with record_function(name):
            yield from self._timed(name)

    def _timed(self, name: str) -> Iterator[None]:
        if self._device.type == "cuda":
            # Events cost microseconds on the stream; a host timer would need a wait.
            self._collect()
            begin, end = self._event(), self._event()
            begin.record()
            yield
            end.record()
            self._pending.append((name, begin, end))
        else:
            begin = time.perf_counter()
            yield
            self._seconds[name] += time.perf_counter() - begin

    def _event(self) -> torch.cuda.Event:
        return self._free.pop() if self._free else torch.cuda.Event(enable_timing=True)

    def _collect(self) -> None:
        """Add up the oldest pairs, up to the first that the device has not passed yet."""
        while self._pending and self._pending[0][2].query():
            name, begin, end = self._pending.popleft()
            self._seconds[name] += begin.elapsed_time(end) * 1e-3
            self._free += (begin, end)

    def move(self, source: str, target: str, seconds: float) -> None:
        """Count ``seconds`` that were measured inside of ``source`` as ``target`` instead."""
        self._seconds[source] -= seconds
        self._seconds[target] += seconds

    def read(self) -> dict[str, float]:
        """Return seconds per part since the last read, and "total", the wall time between. Waits for the device."""
        seconds = self.peek()
        self._seconds, self._last_read = defaultdict(float), time.perf_counter()
        return seconds

    def peek(self) -> dict[str, float]:
        """Return what `read` would, without starting anew. Waits for the device."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            self._collect()
        return {**self._seconds, "total": time.perf_counter() - self._last_read}

    def resume(self, seconds: dict[str, float]) -> None:
        """Continue, from now, what `peek` returned in an earlier process."""
        parts = {name: value for name, value in seconds.items() if name != "total"}
        self._seconds = defaultdict(float, parts)
        self._pending.clear()
        self._last_read = time.perf_counter() - seconds["total"]


class StepProfile:
    """Records `ACTIVE` steps of rank 0 into ``<run folder>/profile``: ``trace.json`` (chrome://tracing, Perfetto) and
    ``table.txt`` (operators and named parts by their own time).

    Args:
        folder: the run folder.
        device: of the run.
        say: takes messages, such as where the files are.
    """

    def __init__(self, folder: Path, device: torch.device, say: Callable[[str], None]) -> None:
        self._folder, self._say = folder / "profile", say
        self.problem = ""
        """Why there is no profile though its steps were done, one line."""
        self._is_recorded = False
        self._kind = device.type
        activities = [ProfilerActivity.CPU]
        if device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        self._profiler = profile(
            activities=activities,
            schedule=schedule(wait=WAIT, warmup=WARM, active=ACTIVE, repeat=1),
            on_trace_ready=self._write,
            profile_memory=True,
            acc_events=True,
        )

    def start(self) -> None:
        """Start recording, before the first step."""
        self._profiler.start()

    def step(self) -> None:
        """Note the end of a step."""
        self._profiler.step()

    def stop(self) -> None:
        """End the profile after the last step; warn where the run was too short for one."""
        self._profiler.stop()
        if not self._is_recorded:
            self._say(
                f"warning: no profile: it records {ACTIVE} steps after {WAIT + WARM} others, these were fewer"
            )

    def _write(self, profiler: Any) -> None:
        self._is_recorded = True
        trace = self._folder / "trace.json"
        try:
            self._folder.mkdir(exist_ok=True)
            trace.unlink(missing_ok=True)
            profiler.export_chrome_trace(str(trace))
            # The library writes it in C++, and where the disk refuses it says nothing and leaves a part or nothing.
            if not _ends_with_a_brace(trace):
                raise OSError(f"{trace.name} is not whole")
            order = f"self_{self._kind}_time_total"
            table = profiler.key_averages().table(sort_by=order, row_limit=_ROWS, max_name_column_width=60)
            atomic.write_text(self._folder / "table.txt", table + "\n")
        except (OSError, RuntimeError) as error:
            self.problem = f"the profile could not be written ({' '.join(str(error).split())})"
            self._say(f"warning: {self.problem}")
            return
        self._say(f"profile of {ACTIVE} steps: {self._folder}/table.txt, {self._folder}/trace.json")


def _ends_with_a_brace(path: Path) -> bool:
    """Return True if a file is there up to the end of its JSON object."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 64))
        return file.read().rstrip().endswith(b"}")
