"""The regular row: loss, learning rate, speed, memory, where the time went, and which process is slow."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import torch

from harness.loop import Run, mean_losses
from harness.probes.memory import MemoryMeter
from harness.protocols import MetricRow, Probe

LONG_ENOUGH_S = 0.2
"""Own time since the last row below which a ratio says more about the scheduler than about the process."""


class Progress:
    """Due every ``log_every`` steps, in the first and the last step, and whenever another probe is.

    It must be the last probe of a run: it reads the clock, so that a row holds what its own probes cost.

    Args:
        run: assembled.
        others: the probes before it.
    """

    def __init__(self, run: Run, others: Sequence[Probe]) -> None:
        self._run, self._others = run, others
        self._memory = MemoryMeter(run)
        self._last_step = 0
        self._last_tokens = 0

    def due(self, step: int) -> bool:
        config = self._run.config
        return (
            step == 0
            or (step + 1) % config.log_every == 0
            or step + 1 == config.steps
            or any(probe.due(step) for probe in self._others)
        )

    def before_update(self, step: int) -> None:
        """Do nothing: the figures are read after the step."""

    def state(self) -> dict[str, Any]:
        """Return where the last row was."""
        return {"last_step": self._last_step, "last_tokens": self._last_tokens}

    def restore(self, state: dict[str, Any], steps: int) -> None:
        """Continue from that row."""
        self._last_step, self._last_tokens = state["last_step"], state["last_tokens"]

    def measure(self, step: int, row: MetricRow) -> None:
        run, info = self._run, self._run.info
        # Before the clock is read: the wait for the device belongs to the steps of this row.
        losses = mean_losses(run)
        seconds = run.clock.read()
        steps, self._last_step = step + 1 - self._last_step, step + 1
        tokens, self._last_tokens = run.state.tokens - self._last_tokens, run.state.tokens
        run.state.wall_s += seconds["total"]
        probes = seconds.pop("probes", 0.0)
        total = seconds.pop("total")
        training = max(total - probes, 1e-9)
        row["wall_s"] = run.state.wall_s
        row.update(losses)
        row["lr"] = matrix_lr(run.optimizer)
        row["grad_norm"] = None if run.state.grad_norm is None else run.state.grad_norm.item()
        row["skipped_steps"] = run.state.skipped
        row["throughput/tokens_per_s"] = tokens / training
        row["flops"] = info.flops_per_token * run.state.tokens
        if info.peak_flops is not None:
            achieved = info.flops_per_token * tokens / training
            row["throughput/mfu"] = achieved / (info.peak_flops * run.engine.world_size)
        row.update(self._times(seconds, probes, total, steps))
        row.update(self._memory.read())

    def _times(self, seconds: dict[str, float], probes: float, total: float, steps: int) -> MetricRow:
        communication = self._run.engine.exposed_communication()
        per_step = {
            part: seconds.get(part, 0.0) / steps for part in ("data", "forward_backward", "optimizer")
        }
        if communication is not None:
            # The engine's figure is of one step, the clock's a mean: never more than the whole.
            communication = min(communication, per_step["forward_backward"])
            per_step["communication"] = communication
            per_step["forward_backward"] -= communication
        per_step["probes"] = probes / steps
        per_step["other"] = max(0.0, total / steps - sum(per_step.values()))
        return {f"time/{part}_s": value for part, value in per_step.items()}


class Balance:
    """Adds the slowest process and by how much it is slower in what each does alone: data and forward passes.

    It is due with the rows that come every ``log_every`` steps, of which the first warms up. It adds nothing where
    there is one process, and where forward passes gather weights, in which all processes wait for each other.
    """

    def __init__(self, run: Run) -> None:
        self._run = run

    def due(self, step: int) -> bool:
        engine = self._run.engine
        is_row = (step + 1) % self._run.config.log_every == 0
        return step > 0 and is_row and engine.world_size > 1 and engine.forward_is_local

    def before_update(self, step: int) -> None:
        """Do nothing: the figures are read after the step."""

    def state(self) -> dict[str, Any]:
        """Return nothing: it has no state."""
        return {}

    def restore(self, state: dict[str, Any], steps: int) -> None:
        """Do nothing: it has no state."""

    def measure(self, step: int, row: MetricRow) -> None:
        engine, seconds = self._run.engine, self._run.clock.peek()
        own = torch.zeros(engine.world_size, dtype=torch.float64, device=engine.device)
        # One row per process in a sum: an all-gather of one number each.
        own[engine.rank] = seconds.get("data", 0.0) + seconds.get("forward", 0.0)
        times = engine.sum(own).tolist()
        slowest = max(range(len(times)), key=times.__getitem__)
        others = statistics.median(time for rank, time in enumerate(times) if rank != slowest)
        row["balance/slowest_rank"] = slowest
        row["balance/ratio"] = times[slowest] / others if others >= LONG_ENOUGH_S else None


def matrix_lr(optimizer: torch.optim.Optimizer) -> float:
    """Return the learning rate of the matrix rule's group, or of the first group if rules are unknown."""
    groups = optimizer.param_groups
    return next((group for group in groups if group.get("rule", "adamw") != "adamw"), groups[0])["lr"]
