"""The regular row: loss, learning rate, speed, memory, and where the time went."""

from __future__ import annotations

from typing import Any

import torch

from harness.loop import Run, mean_losses
from harness.probes.memory import MemoryMeter
from harness.record.folder import Row


class Progress:
    """Due every ``log_every`` steps, in the first and the last step, and whenever another probe is.

    It must be the last probe of a run: it reads the clock, so that a row holds what its own probes cost.
    """

    def __init__(self, run: Run, memory: MemoryMeter) -> None:
        self._run, self._memory, self._flops = run, memory, run.whole.flops
        self._last_step = 0
        self._last_tokens = 0

    def due(self, step: int) -> bool:
        config = self._run.config
        return (
            step == 0
            or (step + 1) % config.log_every == 0
            or step + 1 == config.steps
            or any(probe.due(step) for probe in self._run.probes if probe is not self)
        )

    def before_update(self, step: int) -> None:
        """Nothing to prepare."""

    def state(self) -> dict[str, Any]:
        """Where the last row was."""
        return {"last_step": self._last_step, "last_tokens": self._last_tokens}

    def restore(self, state: dict[str, Any], steps: int) -> None:
        """Go on from that row."""
        self._last_step, self._last_tokens = state["last_step"], state["last_tokens"]

    def measure(self, step: int, row: Row) -> None:
        run = self._run
        losses = mean_losses(run)
        seconds = run.clock.read()
        steps, self._last_step = step + 1 - self._last_step, step + 1
        tokens, self._last_tokens = run.ledger.tokens - self._last_tokens, run.ledger.tokens
        run.ledger.wall_s += seconds["total"]
        probes = seconds.pop("probes", 0.0)
        total = seconds.pop("total")
        training = max(total - probes, 1e-9)
        row["wall_s"] = run.ledger.wall_s
        row.update(losses)
        row["lr"] = matrix_lr(run.optimizer)
        row["grad_norm"] = None if run.ledger.grad_norm is None else run.ledger.grad_norm.item()
        row["skipped_steps"] = run.ledger.skipped
        row["throughput/tokens_per_s"] = tokens / training
        row["flops"] = self._flops.per_token * run.ledger.tokens
        if self._flops.peak is not None:
            achieved = self._flops.per_token * tokens / training
            row["throughput/mfu"] = achieved / (self._flops.peak * run.engine.world_size)
        row.update(self._times(seconds, probes, total, steps))
        row.update(self._memory.read())

    def _times(self, seconds: dict[str, float], probes: float, total: float, steps: int) -> Row:
        communication = self._run.engine.exposed_communication()
        per_step = {
            part: seconds.get(part, 0.0) / steps for part in ("data", "forward_backward", "optimizer")
        }
        if communication is not None:
            communication = min(communication, per_step["forward_backward"])
            per_step["communication"] = communication
            per_step["forward_backward"] -= communication
        per_step["probes"] = probes / steps
        per_step["other"] = max(0.0, total / steps - sum(per_step.values()))
        return {f"time/{part}_s": value for part, value in per_step.items()}


def matrix_lr(optimizer: torch.optim.Optimizer) -> float:
    """Learning rate of the matrix rule's group, or of the first group where no rule is told apart."""
    groups = optimizer.param_groups
    return next((group for group in groups if group.get("rule", "adamw") != "adamw"), groups[0])["lr"]
