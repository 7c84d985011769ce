"""`profile=true`: a trace of a few steps, and what took the time in them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from harness.record import atomic

WAIT, WARM, ACTIVE = 2, 1, 3
"""Steps that are left alone (allocation, compilation), that warm the profiler up, and that are recorded."""
_ROWS = 40


class StepProfile:
    """Records `ACTIVE` steps of rank 0 into ``<run folder>/profile``: ``trace.json`` (chrome://tracing, Perfetto) and
    ``table.txt`` (operators and named parts by their own time).

    Args:
        folder: the run folder.
        device: of the run.
        say: told where the files are.
    """

    def __init__(self, folder: Path, device: torch.device, say: Callable[[str], None]) -> None:
        self._folder, self._say = folder / "profile", say
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
        """Before the first step."""
        self._profiler.start()

    def step(self) -> None:
        """After each step."""
        self._profiler.step()

    def stop(self) -> None:
        """After the last step."""
        self._profiler.stop()

    def _write(self, profiler: Any) -> None:
        self._folder.mkdir(exist_ok=True)
        profiler.export_chrome_trace(str(self._folder / "trace.json"))
        order = f"self_{self._kind}_time_total"
        table = profiler.key_averages().table(sort_by=order, row_limit=_ROWS, max_name_column_width=60)
        atomic.write_text(self._folder / "table.txt", table + "\n")
        self._say(f"profile of {ACTIVE} steps: {self._folder}/table.txt, {self._folder}/trace.json")
