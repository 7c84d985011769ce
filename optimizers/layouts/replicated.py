"""Every process holds every matrix whole: one process (`Whole`), or equal replicas (`Replicated`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from optimizers.linalg.inverse_root import InverseRoot, inverse_root

BasisMaker = Callable[[], Tensor]


class Rows(Protocol):
    """What a rule asks of a layout. Each call takes a list with one entry per stack, and every process issues
    the same calls in the same order.

    Attributes:
        exchanges_bases: `bases` communicates, so all stacks of a step should share one call.
    """

    exchanges_bases: bool

    def total(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """Each tensor summed over the processes that hold the rows of its matrices."""
        ...

    def roots(
        self, grams: Sequence[Tensor], rtols: Sequence[float], methods: Sequence[str]
    ) -> list[InverseRoot]:
        """(MᵀM)^(-1/2) of (b, r, r) fp64 Grams, which may be partial sums over rows."""
        ...

    def bases(self, makers: Sequence[BasisMaker], like: Sequence[Tensor]) -> list[Tensor]:
        """New subspace bases: `makers[i]` computes one, of shape, dtype and device of `like[i]`.

        They come from eigen- or singular vectors, of which a last-bit difference between machines can make
        another
        basis: one process makes them, all use the same bits.
        """
        ...


class Whole:
    """One process: every sum is complete, every basis is made here."""

    exchanges_bases = False

    def total(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """The parts themselves."""
        return list(parts)

    def roots(
        self, grams: Sequence[Tensor], rtols: Sequence[float], methods: Sequence[str]
    ) -> list[InverseRoot]:
        """Computed here: a smooth map of numbers that all replicas share bit by bit."""
        return [inverse_root(g, rtol, method) for g, rtol, method in zip(grams, rtols, methods)]

    def bases(self, makers: Sequence[BasisMaker], like: Sequence[Tensor]) -> list[Tensor]:
        """Made here."""
        return [make() for make in makers]


class Replicated(Whole):
    """Equal replicas (DDP): all compute everything, but bases come from the group's first process.

    Args:
        group: the processes that hold the replicas; None: all of them.
    """

    exchanges_bases = True

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.source = dist.get_global_rank(group, 0) if group is not None else 0

    def bases(self, makers: Sequence[BasisMaker], like: Sequence[Tensor]) -> list[Tensor]:
        """Made by the first process and sent in one flat buffer per dtype and device."""
        if not makers:
            return []
        owner = dist.get_rank() == self.source
        made = (
            [make().to(t.dtype) for make, t in zip(makers, like)]
            if owner
            else [torch.empty_like(t) for t in like]
        )
        kinds = sorted({(str(t.dtype), str(t.device)) for t in made})
        for kind in kinds:
            chosen = [i for i, t in enumerate(made) if (str(t.dtype), str(t.device)) == kind]
            flat = torch.cat([made[i].reshape(-1) for i in chosen])
            dist.broadcast(flat, self.source, group=self.group)
            for i, part in zip(chosen, flat.split([made[i].numel() for i in chosen])):
                made[i] = part.view(made[i].shape)
        return made
