"""What a run of optbench would hold, counted on the real optimizer over meta tensors: no memory, no training."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from analysis.paper.tables import Quantity
from harness.config.schema import RunConfig
from harness.plan import network, rank
from harness.plan.rank import PlannedRank
from harness.plan.state import held_bytes


@dataclass(frozen=True)
class Counted:
    """One process; with ``single`` and ``ddp`` it holds everything.

    Attributes:
        planned: its model and optimizer.
        held: kind → bytes between two steps in the dtypes that optbench uses, as in `optbench plan`.
    """

    planned: PlannedRank
    held: dict[str, int]

    def memory(self, quantity: Quantity) -> float:
        """Memory in the table's accounting: its bytes for every number, whatever optbench keeps it in."""
        parameters = list(self.planned.network.parameters())
        numbers = {
            "weights": sum(p.numel() for p in parameters),
            "state": sum(self._state(p) for p in parameters),
        }
        return quantity.in_unit(sum(numbers[kind] for kind in quantity.counts) * quantity.bytes_per_number)

    def held_memory(self, quantity: Quantity) -> float:
        """Memory of the same kinds in optbench's dtypes, as in `optbench plan`."""
        state = sum(size for kind, size in self.held.items() if kind.startswith("optimizer/"))
        sizes = {"weights": self.held["weights"], "state": state}
        return quantity.in_unit(sum(sizes[kind] for kind in quantity.counts))

    def matrix(self, name: str) -> tuple[tuple[int, ...], int]:
        """Shape of a parameter, and how many numbers its state has.

        Raises:
            ValueError: the model has no parameter of this name.
        """
        parameters = dict(self.planned.network.named_parameters())
        if name not in parameters:
            raise ValueError(f"the model has no parameter {name}")
        return tuple(parameters[name].shape), self._state(parameters[name])

    def _state(self, parameter: torch.nn.Parameter) -> int:
        state = self.planned.optimizer.state[parameter]
        return sum(value.numel() for value in state.values() if isinstance(value, torch.Tensor))


def count(config: RunConfig) -> Counted | None:
    """Count rank 0 of a checked configuration; None for an optimizer by import path, which nobody can plan."""
    if config.optimizer.target is not None:
        return None
    module = network.build(config.model, config.precision, trust_remote_code=config.trust_remote_code)
    planned = rank.simulate(config, module, 0)
    return Counted(planned, held_bytes(config, planned))
