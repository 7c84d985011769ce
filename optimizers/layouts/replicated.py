"""Every process holds every matrix whole: one process (`Whole`), or equal replicas (`Replicated`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from optimizers.linalg.inverse_root import GRAM_RTOL, InverseRoot, inverse_root
from optimizers.linalg.sketching import Steps, alone

BasisMaker = Callable[[], "Tensor | Steps"]
Solver = Callable[[Tensor], InverseRoot]


class Rows(Protocol):
    """What a rule asks of a layout. Each call takes a list with one entry per stack, and every process issues
    the same calls in the same order.

    Where matrices are split over ranks, `partial` says which entries are this rank's share of a sum; the
    others are complete. None: all are shares.

    Attributes:
        exchanges_bases: `bases` communicates, so all stacks of a step should share one call.
    """

    exchanges_bases: bool

    def total(self, parts: Sequence[Tensor], partial: Sequence[bool] | None = None) -> list[Tensor]:
        """Each share summed over the processes that hold parts of its matrices."""
        ...

    def roots(
        self,
        grams: Sequence[Tensor],
        solvers: Sequence[Solver] | None = None,
        partial: Sequence[bool] | None = None,
    ) -> list[InverseRoot]:
        """(MᵀM)^(-1/2) of (b, r, r) fp64 Grams, by `solvers` (None: `inverse_root` at its lowest cut)."""
        ...

    def bases(self, makers: Sequence[BasisMaker], like: Sequence[Tensor]) -> list[Tensor]:
        """New subspace bases: `makers[i]` computes one, of shape, dtype and device of `like[i]`; for a split
        matrix it returns the steps to it (`linalg.sketching`).

        They come from eigen- or singular vectors, of which a last-bit difference between machines can make
        another
        basis: one process makes them, all use the same bits.
        """
        ...


def solved(grams: Sequence[Tensor], solvers: Sequence[Solver] | None) -> list[InverseRoot]:
    """Each Gram's root, computed here."""
    if solvers is None:
        return [inverse_root(gram, GRAM_RTOL) for gram in grams]
    return [solver(gram) for gram, solver in zip(grams, solvers)]


def made(maker: BasisMaker) -> Tensor:
    """The basis, where nothing is split."""
    basis = maker()
    return basis if isinstance(basis, Tensor) else alone(basis)


class Whole:
    """One process: every sum is complete, every basis is made here."""

    exchanges_bases = False

    def total(self, parts: Sequence[Tensor], partial: Sequence[bool] | None = None) -> list[Tensor]:
        """The parts themselves."""
        return list(parts)

    def roots(
        self,
        grams: Sequence[Tensor],
        solvers: Sequence[Solver] | None = None,
        partial: Sequence[bool] | None = None,
    ) -> list[InverseRoot]:
        """Computed here: a smooth map of numbers that all replicas share bit by bit."""
        return solved(grams, solvers)

    def bases(self, makers: Sequence[BasisMaker], like: Sequence[Tensor]) -> list[Tensor]:
        """Made here."""
        return [made(maker) for maker in makers]


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
        found = (
            [made(maker).to(t.dtype) for maker, t in zip(makers, like)]
            if owner
            else [torch.empty_like(t) for t in like]
        )
        kinds = sorted({(str(t.dtype), str(t.device)) for t in found})
        for kind in kinds:
            chosen = [i for i, t in enumerate(found) if (str(t.dtype), str(t.device)) == kind]
            flat = torch.cat([found[i].reshape(-1) for i in chosen])
            dist.broadcast(flat, self.source, group=self.group)
            for i, part in zip(chosen, flat.split([found[i].numel() for i in chosen])):
                found[i] = part.view(found[i].shape)
        return found
