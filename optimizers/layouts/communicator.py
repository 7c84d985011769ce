"""Collectives on one process group, with the bytes that each rank sends counted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


class Pending(NamedTuple):
    """The handle of a collective that was started."""

    result: Tensor
    work: dist.Work | None

    def wait(self) -> Tensor:
        """Return the result. On CUDA the current stream waits, not the host."""
        if self.work is not None:
            self.work.wait()
        return self.result


class Communicator:
    """A process group, by the few collectives that layouts need.

    Attributes:
        rank: of this process in the group.
        size: processes in the group.
        sent: kind of collective → bytes that this rank has sent since construction, by the ring
            convention: all-reduce 2B(W-1)/W, all-gather and reduce-scatter B(W-1)/W of the whole
            buffer B, all-to-all what leaves the rank, broadcast B(W-1)/W.
        calls: kind of collective → how often it was issued.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.sent: dict[str, float] = {}
        self.calls: dict[str, int] = {}

    def sum(self, flat: Tensor) -> Tensor:
        """Sum a 1-D tensor over the ranks, in place."""
        self._count("all_reduce", 2 * _ring(flat, self.size))
        dist.all_reduce(flat, group=self.group)
        return flat

    def maximum(self, flat: Tensor) -> Tensor:
        """Reduce a 1-D tensor to the element-wise maximum over the ranks, in place."""
        self._count("all_reduce", 2 * _ring(flat, self.size))
        dist.all_reduce(flat, dist.ReduceOp.MAX, group=self.group)
        return flat

    def any(self, flags: Tensor) -> Tensor:
        """Reduce booleans over the ranks by an element-wise or."""
        return self.maximum(flags.to(torch.uint8)) > 0

    def gather(self, part: Tensor) -> Tensor:
        """Gather (n,) of each rank to (W, n)."""
        return self.start_gather(part).wait()

    def start_gather(self, part: Tensor) -> Pending:
        """Start gathering (n,) of each rank to (W, n)."""
        result = part.new_empty(self.size, part.numel())
        self._count("all_gather", _ring(result, self.size))
        work = dist.all_gather_single(
            result.view(-1), part.contiguous().view(-1), group=self.group, async_op=True
        )
        return Pending(result, work)

    def sum_scatter(self, parts: Tensor) -> Tensor:
        """Sum (W, n) over the ranks and return row `rank` of it, (n,)."""
        result = parts.new_empty(parts.shape[1])
        self._count("reduce_scatter", _ring(parts, self.size))
        dist.reduce_scatter_single(result, parts.reshape(-1), group=self.group)
        return result

    def swap(self, send: Tensor, sent: Sequence[int], received: Sequence[int]) -> Pending:
        """Start an all-to-all of a 1-D tensor.

        Args:
            send: elements for rank 0, then for rank 1, …
            sent: how many for each rank.
            received: how many come from each rank.
        """
        result = send.new_empty(sum(received))
        leaving = sum(sent) - sent[self.rank]
        self._count("all_to_all", leaving * send.element_size())
        work = dist.all_to_all_single(
            result, send, list(received), list(sent), group=self.group, async_op=True
        )
        return Pending(result, work)

    def broadcast(self, flat: Tensor, source: int = 0) -> Tensor:
        """Replace a tensor by that of rank `source` of the group, in place."""
        self._count("broadcast", _ring(flat, self.size))
        dist.broadcast(flat, group=self.group, group_src=source)
        return flat

    def _count(self, kind: str, size: float) -> None:
        self.sent[kind] = self.sent.get(kind, 0) + size
        self.calls[kind] = self.calls.get(kind, 0) + 1


class SimulatedCommunicator(Communicator):
    """Simulate one rank of a process group on meta tensors: count the same bytes and move none."""

    def __init__(self, rank: int, size: int) -> None:
        self.group, self.rank, self.size = None, rank, size
        self.sent, self.calls = {}, {}

    def sum(self, flat: Tensor) -> Tensor:
        """Count the bytes of an all-reduce."""
        self._count("all_reduce", 2 * _ring(flat, self.size))
        return flat

    def maximum(self, flat: Tensor) -> Tensor:
        """Count the bytes of an all-reduce."""
        self._count("all_reduce", 2 * _ring(flat, self.size))
        return flat

    def start_gather(self, part: Tensor) -> Pending:
        """Count the bytes of an all-gather."""
        result = part.new_empty(self.size, part.numel())
        self._count("all_gather", _ring(result, self.size))
        return Pending(result, None)

    def sum_scatter(self, parts: Tensor) -> Tensor:
        """Count the bytes of a reduce-scatter."""
        self._count("reduce_scatter", _ring(parts, self.size))
        return parts.new_empty(parts.shape[1])

    def swap(self, send: Tensor, sent: Sequence[int], received: Sequence[int]) -> Pending:
        """Count the bytes of an all-to-all."""
        self._count("all_to_all", (sum(sent) - sent[self.rank]) * send.element_size())
        return Pending(send.new_empty(sum(received)), None)

    def broadcast(self, flat: Tensor, source: int = 0) -> Tensor:
        """Count the bytes of a broadcast."""
        self._count("broadcast", _ring(flat, self.size))
        return flat


def _ring(buffer: Tensor, size: int) -> float:
    return buffer.numel() * buffer.element_size() * (size - 1) / size
