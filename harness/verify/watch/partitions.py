"""Ways to see one parameter as matrices: whole, its parts, its heads, or the slices that ranks hold."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from optimizers.routing import Route

Cut = Callable[[Tensor], list[Tensor]]


@dataclass(frozen=True)
class Partition:
    """How a parameter is cut into matrices before each is orthogonalized on its own.

    Attributes:
        kind: "whole", "parts" (of a fused projection), "experts", "heads" or "shards".
        label: for people, such as "4 row slices".
        cut: gives the (m, n) matrices of a parameter-shaped tensor.
        transposed: the matrices are stored as (in, out).
    """

    kind: str
    label: str
    cut: Cut
    transposed: bool = False


def partitions(
    shape: Sequence[int], route: Route | None, shards: tuple[int, int], heads: Sequence[int], world: int
) -> list[list[Partition]]:
    """Return the ways to cut a parameter, likely ones first: those of one list are tried together.

    Args:
        shape: of the parameter, with two or more axes.
        route: says which matrices a fused projection or a stack of experts consists of.
        shards: axis and number of a DTensor's shards, or of ZeRO's partitions.
        heads: numbers of heads of the model's attention.
        world: number of ranks.
    """
    transposed = bool(route and route.blocks and route.blocks[0].transposed)
    first = [Partition("whole", "whole", _whole, transposed)]
    blocks = route.blocks if route is not None else ()
    if len(shape) == 3 and blocks:
        first = [Partition("experts", "each expert", lambda t: [block.matrix(t) for block in blocks])]
    elif len(blocks) > 1:
        names = ", ".join(block.part for block in blocks)
        first.append(
            Partition("parts", f"parts {names}", lambda t: [block.matrix(t) for block in blocks], transposed)
        )
    if len(shape) != 2:
        return [first]
    axis, count = shards
    if count > 1:
        first.append(_slices(axis, count, "shards"))
    others = [_slices(0, k, "heads") for k in heads if 1 < k <= shape[0] and shape[0] % k == 0]
    for k in dict.fromkeys((world, 2, 4, 8)):
        others += [_slices(axis, k, "shards") for axis in (0, 1) if 1 < k <= shape[axis]]
    return [first, others]


def _whole(tensor: Tensor) -> list[Tensor]:
    return [tensor if tensor.ndim == 2 else tensor.reshape(len(tensor), -1)]


def _slices(axis: int, count: int, kind: str) -> Partition:
    """Return the slices that `torch.chunk` gives, as DTensor and FSDP2 cut."""
    label = f"{count} {'row' if axis == 0 else 'column'} slices" + (" (heads)" if kind == "heads" else "")
    return Partition(kind, label, lambda t: list(t.chunk(count, axis)))
