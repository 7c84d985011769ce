"""Every process holds every matrix whole: one process, or equal replicas (DDP, ZeRO-0)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from optimizers.fused_projections import Block
from optimizers.layouts.communicator import Communicator
from optimizers.layouts.exchange import balanced_owners
from optimizers.layouts.lanes import Lane, LocalLane, SplitLane, buckets, make_banks
from optimizers.layouts.layout import StepUnit, local_shapes, whole_groups
from optimizers.layouts.rows import BasisMaker, Rows, Whole, made
from optimizers.members import Held, Holding, Member
from optimizers.rules.rule import Rule

__all__ = ["Replicated", "ReplicatedLayout", "Whole"]


class Replicated(Whole):
    """Equal replicas (DDP): all compute everything, but bases come from the group's first process.

    Args:
        ranks: the processes that hold the replicas.
    """

    exchanges_bases = True

    def __init__(self, ranks: Communicator) -> None:
        self.ranks = ranks

    def bases(self, makers: Sequence[BasisMaker], like: Sequence[Tensor]) -> list[Tensor]:
        """Made by the first process and sent in one flat buffer per dtype and device."""
        if not makers:
            return []
        owner = self.ranks.rank == 0
        found = (
            [made(maker).to(t.dtype) for maker, t in zip(makers, like)]
            if owner
            else [torch.empty_like(t) for t in like]
        )
        kinds = sorted({(str(t.dtype), str(t.device)) for t in found})
        for kind in kinds:
            chosen = [i for i, t in enumerate(found) if (str(t.dtype), str(t.device)) == kind]
            flat = torch.cat([found[i].reshape(-1) for i in chosen])
            self.ranks.broadcast(flat)
            for i, part in zip(chosen, flat.split([found[i].numel() for i in chosen])):
                found[i] = part.view(found[i].shape)
        return found


class ReplicatedLayout:
    """One process, or equal replicas.

    Args:
        group: the processes that hold the replicas; None: this process alone.
        work: "replicated": all compute everything, so that state is replicated, too; "split": each matrix is
            computed, and its state kept, by one of them (longest first), which sends the update to all.
    """

    def __init__(self, group: dist.ProcessGroup | None = None, work: str = "replicated") -> None:
        self._ranks = None if group is None else Communicator(group)
        self.rows: Rows = Whole() if self._ranks is None else Replicated(self._ranks)
        self._communicator = self._ranks if work == "split" else None

    @property
    def communicators(self) -> list[Communicator]:
        """For the bytes that this process has sent."""
        return [] if self._ranks is None else [self._ranks]

    @property
    def is_divided(self) -> bool:
        """With split work."""
        return self._communicator is not None

    @property
    def is_first_replica(self) -> bool:
        """The first process of the group."""
        return self._ranks is None or self._ranks.rank == 0

    def interval(self, parameter: Tensor) -> tuple[int | None, int]:
        """All of it."""
        return None, 0

    def holding(self, parameter: Tensor, block: Block) -> Holding:
        """Whole."""
        return Held(block.shape)

    def lanes(self, members: Sequence[Member], rule: Rule, options: Mapping[str, Any]) -> list[Lane]:
        """One lane; with split work one for each shape."""
        if self._communicator is None:
            made_banks = make_banks(members, options, lambda m: local_shapes(m, rule, options))
            return [LocalLane(made_banks, self.rows)]
        costs = [work_of(m.block.shape) for m in members]
        owners = balanced_owners(costs, self._communicator.size)
        return [
            SplitLane(
                [members[i] for i in chosen], [owners[i] for i in chosen], self._communicator, rule, options
            )
            for chosen in buckets(members, owners)
        ]

    def step_units(self, groups: Sequence[Mapping[str, Any]]) -> Iterable[StepUnit]:
        """Each group."""
        return whole_groups(groups)

    def all_step_units(self, groups: Sequence[Mapping[str, Any]]) -> Iterable[StepUnit]:
        """Each group."""
        return whole_groups(groups)

    def check(self, named: Sequence[tuple[str, Tensor]]) -> None:
        """Whole tensors only."""
        for name, parameter in named:
            if isinstance(parameter, DTensor):
                raise TypeError(f"{name}: is a DTensor, while the other parameters are not")

    def agree(self, unit: StepUnit, flags: Tensor) -> Tensor:
        """All replicas have all gradients, and they are equal."""
        return flags

    def weight(self, parameter: Tensor) -> Tensor:
        """The parameter."""
        return parameter

    def gradient(self, parameter: Tensor) -> Tensor | None:
        """Its gradient."""
        return parameter.grad


def work_of(shape: tuple[int, int]) -> float:
    """Cost of a matrix' step, up to a factor: products of the matrix with others as wide as its short side."""
    return float(shape[0] * shape[1] * min(shape))
