"""What a rule asks of a layout, and the answers where one process holds every matrix whole."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from optimizers.linalg.gram_root import GramRoot
from optimizers.linalg.inverse_root import InverseRoot
from optimizers.linalg.polar import Polar
from optimizers.linalg.sketching import Steps, answer_alone, driven

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

    def brings(self, length: int, rank: int) -> bool:
        """Whether the factor of a moment that is split along its side of this length is rather computed by
        `factors` than through the Gram of its other side (rank)."""
        ...

    def factors(self, moments: Sequence[SplitMoment]) -> list[Polar]:
        """This process' interval of the factor of each moment."""
        ...

    def bases(self, makers: Sequence[BasisMaker], like: Sequence[Tensor]) -> list[Tensor]:
        """New subspace bases: `makers[i]` computes one, of shape, dtype and device of `like[i]`; for a split
        matrix it returns the steps to it (`linalg.sketching`).

        They come from eigen- or singular vectors, of which a last-bit difference between machines can make
        another
        basis: one process makes them, all use the same bits.
        """
        ...


@dataclass(frozen=True)
class SplitMoment:
    """Moments of which this process holds an interval, and what is wanted of the whole ones.

    Attributes:
        moment: (b, m_local, n) for dim -2, (b, m, n_local) for dim -1.
        shape: (m, n) of a whole one.
        dim: that is split.
        pattern: (start, length) of every rank along it.
        solve: whole moments (b', m, n) → their factors.
    """

    moment: Tensor
    shape: tuple[int, int]
    dim: int
    pattern: tuple[tuple[int, int], ...]
    solve: Callable[[Tensor], Polar]

    def rows(self) -> Tensor:
        """(b, local length, width): the split dimension leads."""
        return self.leading(self.moment)

    def leading(self, matrices: Tensor) -> Tensor:
        """Between the matrices' own orientation and the one in which the split dimension leads."""
        return matrices if self.dim == -2 else matrices.mT

    def whole(self, flat: Tensor) -> Tensor:
        """(b', m·n) as they travel → (b', m, n)."""
        m, n = self.shape
        return flat.view(-1, m, n) if self.dim == -2 else flat.view(-1, n, m).mT


def solved(grams: Sequence[Tensor], solvers: Sequence[GramRoot] | None) -> list[InverseRoot]:
    """Each Gram's root, computed here."""
    return [solver(gram) for gram, solver in zip(grams, solvers or [GramRoot()] * len(grams))]


def made(maker: BasisMaker) -> Tensor:
    """The basis, where nothing is split."""
    basis = maker()
    return basis if isinstance(basis, Tensor) else driven(basis, answer_alone)


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

    def brings(self, length: int, rank: int) -> bool:
        """Nothing is split."""
        return False

    def factors(self, moments: Sequence[SplitMoment]) -> list[Polar]:
        """Computed here."""
        return [part.solve(part.moment) for part in moments]

    def bases(self, makers: Sequence[BasisMaker], like: Sequence[Tensor]) -> list[Tensor]:
        """Made here."""
        return [made(maker) for maker in makers]
