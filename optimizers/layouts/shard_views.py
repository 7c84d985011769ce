"""What a process holds of a matrix where parameters are cut along one axis: the view, and how torch cuts."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor
from torch.distributed.tensor import DTensor

from optimizers.fused_projections import Block
from optimizers.interfaces import ShardBounds


@dataclass(frozen=True)
class ShardView:
    """`LocalView` of a matrix inside a parameter that is cut along `split`.

    Attributes:
        cut: (axis, first, length) that select the matrix within what this process has of the parameter.
        expert: index among the experts that this process has; -1: it has others. None: a 2-D parameter.
        shard_bounds: the intervals of all ranks. Ranks must batch the same matrices, so it decides what is alike.
    """

    shape: tuple[int, int]
    split: int | None
    start: int
    cut: tuple[int, int, int] | None = None
    shard_bounds: ShardBounds | None = None
    expert: int | None = None

    def gradient(self, parameter: Tensor, block: Block) -> Tensor | None:
        """Return this process' rows or columns of the gradient."""
        if parameter.grad is None:
            return None
        here = self._here(local(parameter.grad), block)
        return here if here.ndim == 2 else here.reshape(self.shape)

    def weight(self, parameter: Tensor, block: Block) -> Tensor:
        """Return a view of the local shard."""
        return self._here(local(parameter.detach()), block)

    def elements(self, parameter: Tensor, block: Block) -> Tensor | None:
        """Return the same as `gradient`."""
        return self.gradient(parameter, block)

    def held(self, parameter: Tensor, block: Block) -> Tensor:
        """Return a view of the local shard."""
        return self.weight(parameter, block)

    def part(self, local: Tensor, block: Block) -> Tensor | None:
        """Return its rows or columns."""
        here = self._here(local, block)
        return here if here.ndim == 2 else here.reshape(self.shape)

    def _here(self, shard: Tensor, block: Block) -> Tensor:
        if self.expert is not None:
            if self.expert < 0:
                return block.like_view(shard.new_empty(self.shape))
            return replace(block, expert=self.expert).view(shard)
        return (shard if self.cut is None else shard.narrow(*self.cut)).view(self.shape)


def local(tensor: Tensor) -> Tensor:
    """Return the local shard of a DTensor, or a plain tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def chunk(size: int, ranks: int, rank: int) -> tuple[int, int]:
    """Return the interval of a rank: torch's `Shard` cuts pieces of ceil(size/W), the last may be short or empty."""
    step = -(-size // ranks)
    return min(rank * step, size), min((rank + 1) * step, size)


def shard_view_of(block: Block, axis: int, interval: tuple[int, int]) -> ShardView:
    """Return the view of a matrix in a process' interval of its parameter.

    Args:
        axis: along which the parameter is cut.
        interval: of that axis, here.

    Raises:
        TypeError: the matrix is interleaved with others, so that no interval of it lies here.
    """
    lo, hi = interval
    if block.expert is not None:
        if axis != 0:
            raise TypeError(f"{block.name}: experts sharded along dimension {axis} are not supported")
        inside = lo <= block.expert < hi
        rows = block.shape[0] if inside else 0
        return ShardView((rows, block.shape[1]), 0, 0, expert=block.expert - lo if inside else -1)
    if block.dim == -1:
        return _along(block, axis, lo, hi - lo, None)
    if block.outer != 1:
        raise TypeError(
            f"{block.name}: a fused projection that is interleaved head by head cannot be stepped in shards"
        )
    if axis != block.dim:
        return _along(block, axis, lo, hi - lo, (block.dim, block.start, block.length))
    first, end = max(lo, block.start), min(hi, block.start + block.length)
    length = max(0, end - first)
    cut = (axis, first - lo if length else 0, length)
    return _along(block, axis, first - block.start if length else 0, length, cut)


def _along(block: Block, axis: int, start: int, length: int, cut: tuple[int, int, int] | None) -> ShardView:
    shape = (length, block.shape[1]) if axis == 0 else (block.shape[0], length)
    return ShardView(shape, axis, start, cut)
