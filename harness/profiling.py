"""`profile=true`: a trace of a few steps, and what took the time in them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from harness.files import atomic

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
        """Before the first step."""
        self._profiler.start()

    def step(self) -> None:
        """After each step."""
        self._profiler.step()

    def stop(self) -> None:
        """After the last step."""
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
    """Whether a file is there up to the end of its JSON object."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 64))
        return file.read().rstrip().endswith(b"}")
