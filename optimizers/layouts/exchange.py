"""Move matrices from one distribution over ranks to another and back, in one all-to-all each way.

A distribution says, for each matrix and rank, which interval of the flattened matrix the rank has. What travels
is where the interval of one rank overlaps that of another in the other distribution.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from optimizers.layouts.communicator import Communicator, Pending

Interval = tuple[int, int]
Distribution = Sequence[Sequence[Interval]]
"""[matrix][rank] → (first element, end)."""


class _Move(NamedTuple):
    matrix: int
    lo: int  # within the interval that this rank has
    hi: int


class _Direction(NamedTuple):
    """The part of one rank in an exchange in one direction."""

    moves_out: list[_Move]
    moves_in: list[_Move]
    sent: list[int]
    received: list[int]
    sizes_in: list[int]  # elements of each matrix that this rank then has


class Exchange:
    """The plan between two distributions, as one rank sees it.

    Args:
        sources: where elements are before.
        targets: where they are wanted.
        communicator: the ranks, in the order of the distributions.
    """

    def __init__(self, sources: Distribution, targets: Distribution, communicator: Communicator) -> None:
        self._communicator = communicator
        me = communicator.rank
        self._there = _direction(sources, targets, me, communicator.size)
        self._back = _direction(targets, sources, me, communicator.size)

    def forward(self, intervals: Sequence[Tensor | None], like: Tensor) -> Arriving:
        """Start moving from sources to targets.

        Args:
            intervals: this rank's interval of each matrix, 1-D; None: zeros travel.
            like: tensor of the dtype and device that travels.
        """
        return self._start(self._there, intervals, like)

    def backward(self, intervals: Sequence[Tensor | None], like: Tensor) -> Arriving:
        """Start moving from targets to sources."""
        return self._start(self._back, intervals, like)

    def _start(self, plan: _Direction, intervals: Sequence[Tensor | None], like: Tensor) -> Arriving:
        parts = []
        for move in plan.moves_out:
            flat = intervals[move.matrix]
            if flat is None:
                parts.append(like.new_zeros(move.hi - move.lo))
            else:
                parts.append(flat[move.lo : move.hi].to(like.dtype))
        send = torch.cat(parts) if parts else like.new_empty(0)
        return Arriving(self._communicator.swap(send, plan.sent, plan.received), plan)


class Arriving:
    """The handle of an exchange that was started."""

    def __init__(self, pending: Pending, plan: _Direction) -> None:
        self._pending, self._plan = pending, plan

    def wait(self) -> list[Tensor]:
        """Return this rank's interval of each matrix, 1-D, empty where it has none."""
        flat, plan = self._pending.wait(), self._plan
        result = []
        parts_of: dict[int, list[tuple[int, Tensor]]] = {}
        offsets = accumulate((move.hi - move.lo for move in plan.moves_in), initial=0)
        for move, offset in zip(plan.moves_in, offsets):
            part = flat[offset : offset + move.hi - move.lo]
            parts_of.setdefault(move.matrix, []).append((move.lo, part))
        for matrix, size in enumerate(plan.sizes_in):
            parts = parts_of.get(matrix, [])
            if len(parts) == 1:
                result.append(parts[0][1])
            elif parts:
                result.append(torch.cat([part for _, part in sorted(parts, key=lambda entry: entry[0])]))
            else:
                result.append(flat.new_empty(size))
        return result


class Spread:
    """The plan to send every matrix from its owner to all ranks.

    Where all owners send equally much, it is one all-gather, which crosses a slow link between nodes once for each
    matrix instead of once for each rank behind it; else an all-to-all of the same number of bytes.

    Args:
        owners: rank of each matrix' owner.
        sizes: elements of each matrix.
        communicator: the ranks.
    """

    def __init__(self, owners: Sequence[int], sizes: Sequence[int], communicator: Communicator) -> None:
        self._communicator = communicator
        self._sizes = list(sizes)
        ranks = range(communicator.size)
        self._owned = [[i for i, owner in enumerate(owners) if owner == rank] for rank in ranks]
        self._exchange: Exchange | None = None
        if len({sum(sizes[i] for i in owned) for owned in self._owned}) > 1:
            everywhere = [[(0, size)] * communicator.size for size in sizes]
            self._exchange = Exchange(whole_at(owners, sizes, communicator.size), everywhere, communicator)

    def start(self, matrices: Sequence[Tensor | None], like: Tensor) -> Arriving | Gathering:
        """Start sending.

        Args:
            matrices: those that this rank owns, 1-D; None: zeros travel, or another rank owns it.
            like: tensor of the dtype and device that travels.
        """
        if self._exchange is not None:
            return self._exchange.forward(matrices, like)
        own = [
            like.new_zeros(self._sizes[i]) if part is None else part.to(like.dtype)
            for i in self._owned[self._communicator.rank]
            for part in [matrices[i]]
        ]
        return Gathering(self._communicator.start_gather(torch.cat(own)), self._owned, self._sizes)


class Gathering:
    """The handle of an all-gather of matrices that was started."""

    def __init__(self, pending: Pending, owned: Sequence[Sequence[int]], sizes: Sequence[int]) -> None:
        self._pending, self._owned, self._sizes = pending, owned, sizes

    def wait(self) -> list[Tensor]:
        """Return all matrices, 1-D."""
        rows = self._pending.wait()
        result: dict[int, Tensor] = {}
        for row, owned in zip(rows, self._owned):
            result.update(zip(owned, row.split([self._sizes[i] for i in owned])))
        return [result[i] for i in range(len(self._sizes))]


def _direction(sources: Distribution, targets: Distribution, me: int, size: int) -> _Direction:
    # By rank, then by matrix: the order in which an all-to-all lays the elements out.
    out: list[tuple[int, _Move]] = []
    into: list[tuple[int, _Move]] = []
    for matrix, (has, wants) in enumerate(zip(sources, targets)):
        for moves, mine, theirs in ((out, has[me], wants), (into, wants[me], has)):
            for rank, lo, hi in _overlaps(mine, theirs):
                moves.append((rank, _Move(matrix, lo - mine[0], hi - mine[0])))
    sent, received = [0] * size, [0] * size
    for moves, counts in ((out, sent), (into, received)):
        moves.sort(key=lambda entry: (entry[0], entry[1].matrix))
        for rank, move in moves:
            counts[rank] += move.hi - move.lo
    sizes_in = [wants[me][1] - wants[me][0] for wants in targets]
    return _Direction([move for _, move in out], [move for _, move in into], sent, received, sizes_in)


def _overlaps(mine: Interval, theirs: Sequence[Interval]) -> list[tuple[int, int, int]]:
    """Return (rank, first element, end) of the overlap with each rank's interval that is not empty."""
    if mine[1] <= mine[0]:
        return []
    # Vectorized: a matrix has an interval on each of possibly thousands of ranks, and overlaps few of them.
    bounds = np.asarray(theirs, dtype=np.int64)
    lo, hi = np.maximum(bounds[:, 0], mine[0]), np.minimum(bounds[:, 1], mine[1])
    ranks = np.flatnonzero(hi > lo)
    return [(int(rank), int(lo[rank]), int(hi[rank])) for rank in ranks]


def whole_at(owners: Sequence[int], sizes: Sequence[int], ranks: int) -> list[list[Interval]]:
    """Return the distribution in which each owner holds its matrices whole."""
    return [
        [(0, size) if rank == owner else (0, 0) for rank in range(ranks)]
        for owner, size in zip(owners, sizes)
    ]


def balanced_owners(costs: Sequence[float], ranks: int) -> list[int]:
    """Choose an owner for each matrix: longest first, each to the rank with the least work so far.

    Ties go to the lower rank and the earlier matrix, so that all ranks find the same owners.
    """
    owners, loads = [0] * len(costs), [0.0] * ranks
    for i in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        owners[i] = min(range(ranks), key=lambda rank: (loads[rank], rank))
        loads[owners[i]] += costs[i]
    return owners
