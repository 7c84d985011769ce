"""Copies of the weights that must be equal, bit by bit: found where they are not, by name."""

from __future__ import annotations

import warnings
from typing import Any

import torch

from harness.loop import Run
from harness.protocols import MetricRow

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Bytes of an element → the dtype in which its bits are summed."""


class ReplicaCheck:
    """Compares the copies of every parameter in each ``engine.check_replicas_every``-th row and in the last one.

    The replicas of ddp, zero0 and hsdp compute the same step from the same gradients and never exchange weights. Other
    hardware or another library may round one of them differently; from then on they train different models. The check
    is one all-reduce of two numbers a parameter, in steps in which the host waits anyway.

    Args:
        run: assembled.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self._has_warned = False
        self._replicas = run.engine.parameter_layout().replicas

    def due(self, step: int) -> bool:
        config = self._run.config
        every = config.engine.check_replicas_every
        if every is None or self._replicas is None:
            return False
        return (step + 1) % (every * config.log_every) == 0 or step + 1 == config.steps

    def before_update(self, step: int) -> None:
        """Do nothing: the weights are read after the step."""

    def state(self) -> dict[str, Any]:
        """Return nothing: it has no state."""
        return {}

    def restore(self, state: dict[str, Any], steps: int) -> None:
        """Do nothing: it has no state."""

    def measure(self, step: int, row: MetricRow) -> None:
        engine, replicas = self._run.engine, self._replicas
        assert replicas is not None
        layout, named = engine.parameter_layout(), engine.named_parameters()
        sums = torch.stack([bit_sum(layout.weight(p)) for p in named.values()])
        # The minimum is the negative maximum of the negatives: one collective for both.
        highest, lowest = replicas.maximum(torch.cat([sums, -sums])).view(2, -1)
        # Under hsdp the processes of another shard may see what this one does not.
        differs = engine.max((highest != -lowest).float()).tolist()
        names = [name for name, flag in zip(named, differs) if flag]
        row["replicas/differing"] = len(names)
        if names and not self._has_warned and engine.rank == 0:
            self._has_warned = True
            more = f" and {len(names) - 1} more parameters" if len(names) > 1 else ""
            warnings.warn(
                f"step {step + 1}: the replicas of {names[0]}{more} are no longer equal: the processes train different "
                "models. Usual causes: GPUs or libraries of different versions. Use equal devices, or "
                "engine.optimizer_work=split, which computes each update of a matrix once; continue from a checkpoint "
                "before this step. Later rows count such parameters in replicas/differing",
                RuntimeWarning,
                stacklevel=2,
            )


def bit_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Return the sum of a tensor's bits, read as integers: 0-dim int64.

    Integers add up to the same sum in any order, so that devices that reduce in another order still agree; a sum of
    floating-point numbers would not.
    """
    if not tensor.numel():
        return torch.zeros((), dtype=torch.int64, device=tensor.device)
    return tensor.detach().view(_INTEGERS[tensor.element_size()]).sum(dtype=torch.int64)
