"""One rank of a cluster that does not exist, on meta tensors: an optimizer step in it is its own traffic plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor

from optimizers.fused_projections import Block
from optimizers.interfaces import LocalView, ShardBounds
from optimizers.layouts.communicator import Communicator, SimulatedCommunicator
from optimizers.layouts.partitioned import Flat, PartitionedLayout, Slot
from optimizers.layouts.replicated import ReplicaCollectives, ReplicatedLayout
from optimizers.layouts.shard_views import ShardView, chunk
from optimizers.layouts.sharded import ShardCollectives, ShardedLayout


class SimulatedShards(ShardedLayout):
    """FSDP2 on meta tensors.

    Args:
        axes: id of each parameter → axis that it is cut along.
        rank: that is simulated.
        size: ranks that hold one replica.
    """

    def __init__(self, axes: Mapping[int, int], rank: int, size: int) -> None:
        self._axes = axes
        self._ranks: Communicator = SimulatedCommunicator(rank, size)
        self.replicas = None
        self._shards = ShardCollectives(self._ranks)
        self.collectives = self._shards

    def _axis(self, parameter: Tensor) -> int:
        return self._axes[id(parameter)]

    def local_view(self, parameter: Tensor, block: Block) -> LocalView:
        """Return a view of the real size, without numbers."""
        view = super().local_view(parameter, block)
        assert isinstance(view, ShardView)
        return EmptyView(view.shape, view.split, view.start, view.shard_bounds)

    def weight(self, parameter: Tensor) -> Tensor:
        """Return a tensor of the shard's size."""
        axis = self._axis(parameter)
        lo, hi = chunk(parameter.shape[axis], self._ranks.size, self._ranks.rank)
        return parameter.detach().narrow(axis, lo, hi - lo)

    def gradient(self, parameter: Tensor) -> Tensor | None:
        """Return a tensor of the shard's size."""
        return None if parameter.grad is None else self.weight(parameter)


class SimulatedReplicas(ReplicatedLayout):
    """DDP on meta tensors."""

    def __init__(self, work: str, rank: int, size: int) -> None:
        super().__init__()
        self._ranks = SimulatedCommunicator(rank, size)
        self._communicator = self._ranks if work == "split" else None
        if work != "split":
            self.collectives = ReplicaCollectives(self._ranks)


@dataclass(frozen=True)
class EmptyView:
    """The view of a shard without numbers. Like the real one it allocates nothing: a view into the whole tensor."""

    shape: tuple[int, int]
    split: int | None
    start: int
    shard_bounds: ShardBounds | None

    def gradient(self, parameter: Tensor, block: Block) -> Tensor | None:
        """Return a view of this shape."""
        return None if parameter.grad is None else self._of(parameter.grad)

    def weight(self, parameter: Tensor, block: Block) -> Tensor:
        """Return a view of this shape."""
        return self._of(parameter.detach())

    def elements(self, parameter: Tensor, block: Block) -> Tensor | None:
        """Return a view of this shape."""
        return self.gradient(parameter, block)

    def held(self, parameter: Tensor, block: Block) -> Tensor:
        """Return a view of this shape."""
        return self._of(parameter.detach())

    def part(self, local: Tensor, block: Block) -> Tensor | None:
        """Return a view of this shape."""
        return (
            self._of(local) if local.numel() >= self.shape[0] * self.shape[1] else local.new_empty(self.shape)
        )

    def _of(self, tensor: Tensor) -> Tensor:
        return tensor.reshape(-1)[: self.shape[0] * self.shape[1]].view(self.shape)


def simulated_slices(
    groups: Sequence[Sequence[Tensor]], stage: int, rank: int, size: int
) -> PartitionedLayout:
    """Simulate ZeRO-1, 2 or 3 on meta tensors, partitioned as DeepSpeed does by default.

    Args:
        groups: parameters of each group.
        stage: 1, 2 or 3.
        rank: that is simulated.
        size: ranks.
    """
    ranks = SimulatedCommunicator(rank, size)
    flats = [_flat(parameters, index, stage, rank, size) for index, parameters in enumerate(groups)]
    for flat in flats:
        flat.tensor.grad = flat.tensor.new_empty(flat.tensor.shape)
    return PartitionedLayout(flats, groups, [ranks] * len(flats))


def _flat(parameters: Sequence[Tensor], index: int, stage: int, rank: int, size: int) -> Flat:
    slots: dict[Tensor, Slot] = {}
    total = sum(p.numel() for p in parameters)
    # ZeRO-1 and 2 pad the whole so that every partition is a multiple of 2 elements (NCCL's 4-byte alignment).
    part = -(-total // (2 * size)) * 2
    offset = at = 0
    for p in parameters:
        n = p.numel()
        if stage == 3:
            step = -(-n // size)
            edges = [min(q * step, n) for q in range(size + 1)]
        else:
            edges = [min(max(q * part - offset, 0), n) for q in range(size + 1)]
            offset += n
        pieces = tuple(pairwise(edges))
        slots[p] = Slot(pieces, at)
        at += pieces[rank][1] - pieces[rank][0]
    return Flat(parameters[0].detach().new_empty(at), index, slots)
