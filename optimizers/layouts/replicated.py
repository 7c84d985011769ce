"""Every process holds every matrix whole: one process, or equal replicas (DDP, ZeRO-0)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from optimizers.fused_projections import Block
from optimizers.interfaces import BroadcastBasis, Collectives, LocalView, MatrixRef, ShardBounds
from optimizers.layouts.batches import make_batch_states
from optimizers.layouts.communicator import Communicator
from optimizers.layouts.exchange import balanced_owners
from optimizers.layouts.layout import (
    Bucket,
    LocalBucket,
    StepUnit,
    Unsharded,
    local_shapes,
    make_basis,
    whole_groups,
)
from optimizers.layouts.owner_buckets import WorkSplitBucket, bucket_positions
from optimizers.rule import Rule


@dataclass(frozen=True)
class FullView:
    """The view of a matrix in an ordinary parameter: all of it."""

    shape: tuple[int, int]
    split: int | None = None
    start: int = 0
    shard_bounds: ShardBounds | None = None

    def gradient(self, parameter: Tensor, block: Block) -> Tensor | None:
        """Return the block of `parameter.grad`."""
        return None if parameter.grad is None else block.matrix(parameter.grad)

    def weight(self, parameter: Tensor, block: Block) -> Tensor:
        """Return the block of the parameter."""
        return block.view(parameter)

    def elements(self, parameter: Tensor, block: Block) -> Tensor | None:
        """Return the block as a view, which may be interleaved."""
        return None if parameter.grad is None else block.view(parameter.grad)

    def held(self, parameter: Tensor, block: Block) -> Tensor:
        """Return the block of the parameter."""
        return block.view(parameter)

    def part(self, local: Tensor, block: Block) -> Tensor | None:
        """Return the block of it."""
        return block.matrix(local)


class ReplicaCollectives(Unsharded):
    """The collectives of equal replicas (DDP): all compute everything, but one process makes each basis.

    Args:
        ranks: the processes that hold the replicas.
    """

    exchanges_bases = True

    def __init__(self, ranks: Communicator) -> None:
        self.ranks = ranks

    def broadcast_bases(self, requests: Sequence[BroadcastBasis]) -> list[Tensor]:
        """Make a share of the bases on each process, and send each share in one flat buffer per dtype and device.

        If one process made all of them, the others would wait for it, at 1B parameters for minutes. A request is not
        divided: products of smaller batches may be rounded in another way.
        """
        owners = balanced_owners([request.work for request in requests], self.ranks.size)
        bases = [
            make_basis(request).to(request.like.dtype)
            if owner == self.ranks.rank
            else torch.empty_like(request.like)
            for request, owner in zip(requests, owners)
        ]
        kinds = [(owner, str(t.dtype), str(t.device)) for owner, t in zip(owners, bases)]
        for kind in sorted(set(kinds)):
            positions = [i for i, other in enumerate(kinds) if other == kind]
            flat = torch.cat([bases[i].reshape(-1) for i in positions])
            self.ranks.broadcast(flat, source=kind[0])
            for i, part in zip(positions, flat.split([bases[i].numel() for i in positions])):
                bases[i] = part.view(bases[i].shape)
        return bases


class ReplicatedLayout:
    """One process, or equal replicas.

    Args:
        group: the processes that hold the replicas; None: this process alone.
        work: "replicated": all compute everything, so that state is replicated, too; "split": each matrix is
            computed, and its state kept, by one of them (longest first), which sends the update to all.
    """

    def __init__(self, group: dist.ProcessGroup | None = None, work: str = "replicated") -> None:
        self._ranks = None if group is None else Communicator(group)
        self.collectives: Collectives = (
            Unsharded() if self._ranks is None else ReplicaCollectives(self._ranks)
        )
        self._communicator = self._ranks if work == "split" else None

    @property
    def communicators(self) -> list[Communicator]:
        """Return the communicator of the replicas, if there are several."""
        return [] if self._ranks is None else [self._ranks]

    @property
    def is_divided(self) -> bool:
        """Return True with split work."""
        return self._communicator is not None

    @property
    def is_first_replica(self) -> bool:
        """Return True on the first process of the group."""
        return self._ranks is None or self._ranks.rank == 0

    @property
    def replicas(self) -> Communicator | None:
        """Return all processes: each of them holds every matrix."""
        return self._ranks

    def interval(self, parameter: Tensor) -> tuple[int | None, int]:
        """Return (None, 0): all of it."""
        return None, 0

    def local_view(self, parameter: Tensor, block: Block) -> LocalView:
        """Return a view of the whole matrix."""
        return FullView(block.shape)

    def buckets(self, matrices: Sequence[MatrixRef], rule: Rule, options: Mapping[str, Any]) -> list[Bucket]:
        """Return one bucket; with split work one for each shape."""
        if self._communicator is None:
            batch_states = make_batch_states(matrices, options, lambda m: local_shapes(m, rule, options))
            return [LocalBucket(rule, batch_states, self.collectives)]
        costs = [work_of(m.block.shape) for m in matrices]
        owners = balanced_owners(costs, self._communicator.size)
        return [
            WorkSplitBucket(
                [matrices[i] for i in positions],
                [owners[i] for i in positions],
                self._communicator,
                rule,
                options,
            )
            for positions in bucket_positions(matrices, owners)
        ]

    def step_units(self, groups: Sequence[Mapping[str, Any]]) -> Iterable[StepUnit]:
        """Return one unit per group."""
        return whole_groups(groups)

    all_step_units = step_units

    def check(self, named: Sequence[tuple[str, Tensor]]) -> None:
        """Refuse DTensors, which this layout cannot step."""
        for name, parameter in named:
            if isinstance(parameter, DTensor):
                raise TypeError(f"{name}: is a DTensor, while the other parameters are not")

    def agree(self, unit: StepUnit, flags: Tensor) -> Tensor:
        """Return the flags: all replicas have equal gradients."""
        return flags

    def sum_parts(self, unit: StepUnit, values: Tensor) -> Tensor:
        """Return the numbers: every process holds everything."""
        return values

    def is_writer(self, unit: StepUnit) -> bool:
        """Return True in the first replica."""
        return self.is_first_replica

    def weight(self, parameter: Tensor) -> Tensor:
        """Return the whole parameter."""
        return parameter

    def gradient(self, parameter: Tensor) -> Tensor | None:
        """Return the gradient of the whole parameter."""
        return parameter.grad


def work_of(shape: tuple[int, int]) -> float:
    """Return the cost of a matrix' step up to a factor: products with matrices as wide as its short side."""
    return float(shape[0] * shape[1] * min(shape))
