"""What the loop asks of an engine, and the table of engines."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from importlib import import_module
from typing import Protocol

import torch
from torch import nn

from harness.config.schema import RunConfig


class Engine(Protocol):
    """One process' view of the training processes.

    Every process calls every method in the same order: several of them are collectives.
    """

    name: str
    rank: int
    world_size: int
    device: torch.device
    model: nn.Module
    """The model as it must be called in the forward pass."""

    def process_group(self) -> torch.distributed.ProcessGroup | None:
        """The group over which weights are replicated; None for one process."""
        ...

    def prepare(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Take the model (already on `device`) and the optimizer over."""
        ...

    def autocast(self) -> AbstractContextManager[object]:
        """Mixed precision for a forward pass."""
        ...

    def micro_step(self, *, last: bool) -> AbstractContextManager[object]:
        """Around forward and backward of one micro-batch; only the ``last`` one reduces gradients (means)."""
        ...

    def backward(self, loss: torch.Tensor) -> None:
        """Add this micro-batch's gradients."""
        ...

    def clip(self, max_norm: float | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Unscale and clip the reduced gradients.

        Returns:
            The global gradient norm before clipping, and 1.0 where it is not finite (else 0.0): 0-dim fp32
            tensors on `device`, equal on all processes.
        """
        ...

    def update(self, nonfinite: torch.Tensor) -> None:
        """One optimizer step that leaves weights and state untouched where ``nonfinite`` is 1.0."""
        ...

    def sum(self, value: torch.Tensor) -> torch.Tensor:
        """Sum over the processes (a copy)."""
        ...

    def max(self, value: torch.Tensor) -> torch.Tensor:
        """Maximum over the processes (a copy)."""
        ...

    def vote(self, value: torch.Tensor) -> Callable[[], list[float]]:
        """Start a maximum over the processes; calling the result waits for it. Does not block."""
        ...

    def exposed_communication(self) -> float | None:
        """Seconds of gradient communication in the last step that computation did not hide, where known."""
        ...

    def close(self) -> None:
        """Leave the process group."""
        ...


_ENGINES = {"single": "harness.engines.ddp:ReplicatedEngine", "ddp": "harness.engines.ddp:ReplicatedEngine"}


def start(config: RunConfig) -> Engine:
    """Start this process' part of the engine that ``config.engine`` names (a collective)."""
    module, name = _ENGINES[config.engine.name].split(":")
    return getattr(import_module(module), name)(config)
