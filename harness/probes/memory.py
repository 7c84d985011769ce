"""Bytes of weights, gradients and optimizer state, counted by walking the tensors, and the peak as measured."""

from __future__ import annotations

import resource
import sys

import torch

from harness.engines import Engine
from harness.record.folder import Row
from harness.tracked_optimizer import tracked


class MemoryMeter:
    """Reads this process' memory by kind; every figure is the maximum over the processes.

    ``peak`` is the CUDA allocator's high-water mark, or on a CPU the resident set's (interpreter and
    libraries included: that is what a node must have).
    """

    def __init__(self, engine: Engine, optimizer: torch.optim.Optimizer) -> None:
        self._engine, self._optimizer = engine, optimizer

    def read(self) -> Row:
        """The four ``memory/…_bytes`` keys (a collective)."""
        figures = {
            **self._engine.held_bytes(),
            "optimizer_state": sum(tracked(self._optimizer).state_bytes().values()),
            "peak": peak_bytes(self._engine.device),
        }
        tensor = torch.tensor(list(figures.values()), dtype=torch.float64, device=self._engine.device)
        return {
            f"memory/{kind}_bytes": int(value)
            for kind, value in zip(figures, self._engine.max(tensor).tolist())
        }


def peak_bytes(device: torch.device) -> int:
    """High-water mark of this process, bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
