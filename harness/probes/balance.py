"""Whether one process is slower than the others, who then wait for it in every step."""

from __future__ import annotations

import statistics
from typing import Any

import torch

from harness.loop import Run
from harness.record.folder import Row

LONG_ENOUGH_S = 0.2
"""Own time since the last row below which a ratio says more about the scheduler than about the process."""


class Balance:
    """Adds the slowest process and by how much it is slower, from what each does alone: data and forward passes.

    Nothing where there is one process, and where forward passes gather weights, in which all wait for all. Due with
    the rows that come every ``log_every`` steps, of which the first warms up.
    """

    def __init__(self, run: Run) -> None:
        self._run = run

    def due(self, step: int) -> bool:
        engine = self._run.engine
        is_row = (step + 1) % self._run.config.log_every == 0
        return step > 0 and is_row and engine.world_size > 1 and engine.forward_is_local

    def before_update(self, step: int) -> None:
        """Nothing to prepare."""

    def state(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def restore(self, state: dict[str, Any], steps: int) -> None:
        """Nothing."""

    def measure(self, step: int, row: Row) -> None:
        engine, seconds = self._run.engine, self._run.clock.peek()
        own = torch.zeros(engine.world_size, dtype=torch.float64, device=engine.device)
        own[engine.rank] = seconds.get("data", 0.0) + seconds.get("forward", 0.0)
        times = engine.sum(own).tolist()
        slowest = max(range(len(times)), key=times.__getitem__)
        others = statistics.median(time for rank, time in enumerate(times) if rank != slowest)
        row["balance/slowest_rank"] = slowest
        row["balance/ratio"] = times[slowest] / others if others >= LONG_ENOUGH_S else None
