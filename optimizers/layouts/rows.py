"""What a rule asks of a layout, and the answers where one process holds every matrix whole."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor

from optimizers.linalg.gram_root import GramRoot
from optimizers.linalg.inverse_root import InverseRoot
from optimizers.linalg.sketching import Steps, alone

BasisMaker = Callable[[], "Tensor | Steps"]


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
        solvers: Sequence[GramRoot] | None = None,
        partial: Sequence[bool] | None = None,
    ) -> list[InverseRoot]:
        """(MᵀM)^(-1/2) of (b, r, r) fp64 Grams, by `solvers` (None: the default `GramRoot`)."""
        ...

    def bases(self, makers: Sequence[BasisMaker], like: Sequence[Tensor]) -> list[Tensor]:
        """New subspace bases: `makers[i]` computes one, of shape, dtype and device of `like[i]`; for a split
        matrix it returns the steps to it (`linalg.sketching`).

        They come from eigen- or singular vectors, of which a last-bit difference between machines can make
        another
        basis: one process makes them, all use the same bits.
        """
        ...


def solved(grams: Sequence[Tensor], solvers: Sequence[GramRoot] | None) -> list[InverseRoot]:
    """Each Gram's root, computed here."""
    return [solver(gram) for gram, solver in zip(grams, solvers or [GramRoot()] * len(grams))]


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
        solvers: Sequence[GramRoot] | None = None,
        partial: Sequence[bool] | None = None,
    ) -> list[InverseRoot]:
        """Computed here: a smooth map of numbers that all replicas share bit by bit."""
        return solved(grams, solvers)

    def bases(self, makers: Sequence[BasisMaker], like: Sequence[Tensor]) -> list[Tensor]:
        """Made here."""
        return [made(maker) for maker in makers]
