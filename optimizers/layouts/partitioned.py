"""Parameters laid end to end in flat tensors that are cut over ranks without regard to rows (ZeRO-1, 2, 3).

Most matrices lie whole on one rank and are stepped there, alone. A matrix across a boundary is stepped in rows
by all who hold some: the rank that holds a row's first element takes the row, and only what is missing of that
row travels. A rule without a row form gets such a matrix whole at one of its holders.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from optimizers.fused_projections import Block
from optimizers.layouts.communicator import Communicator
from optimizers.layouts.exchange import Arriving, Exchange, Interval
from optimizers.layouts.lanes import Entry, Lane, LocalLane, OwnerLane, State, buckets, make_banks
from optimizers.layouts.layout import StepUnit, local_shapes
from optimizers.layouts.rows import Rows, Whole
from optimizers.layouts.sharded import Shards
from optimizers.members import Holding, Member
from optimizers.rules.rule import Rule
from optimizers.skipping import StepMask
from optimizers.stacks import ApplyConfig, Bank, LowRank, Stack, descend, stepped


@dataclass(frozen=True)
class Slot:
    """Where a parameter lies: element intervals of all ranks, and where this rank's begins in its flat tensor."""

    pieces: tuple[Interval, ...]
    at: int


@dataclass(frozen=True)
class Flat:
    """One flat tensor of this rank.

    Attributes:
        tensor: 1-D, fp32; its `.grad` is the mean gradient, unscaled and clipped.
        group: index of the parameter group.
        slots: parameter → where it lies, in the order of the flat tensor.
    """

    tensor: Tensor
    group: int
    slots: dict[Tensor, Slot] = field(default_factory=dict)


class Unattached:
    """The layout of an optimizer whose parameters are about to be partitioned: it steps nothing yet."""

    def __init__(self) -> None:
        self.rows: Rows = Whole()
        self.communicators: list[Communicator] = []

    is_first_replica: bool = False
    is_divided: bool = True

    def interval(self, parameter: Tensor) -> tuple[int | None, int]:
        """Not known yet."""
        return None, 0

    def holding(self, parameter: Tensor, block: Block) -> Holding:
        """Not known yet."""
        raise RuntimeError(
            "the optimizer was built for partitioned parameters and is not attached to an engine"
        )

    def lanes(self, members: Sequence[Member], rule: Rule, options: Mapping[str, Any]) -> list[Lane]:
        """None."""
        return []

    def step_units(self, groups: Sequence[Mapping[str, Any]]) -> Iterable[StepUnit]:
        """None."""
        return []

    def all_step_units(self, groups: Sequence[Mapping[str, Any]]) -> Iterable[StepUnit]:
        """None."""
        return []

    def check(self, named: Sequence[tuple[str, Tensor]]) -> None:
        """Nothing starts later: see `Optimizer.step`."""

    def agree(self, unit: StepUnit, flags: Tensor) -> Tensor:
        """Nobody to ask."""
        return flags

    def weight(self, parameter: Tensor) -> Tensor:
        """The parameter."""
        return parameter

    def gradient(self, parameter: Tensor) -> Tensor | None:
        """None."""
        return None


class PartitionedLayout:
    """Flat tensors, each cut over the ranks of its group.

    Args:
        flats: of this rank.
        parameters: group by group, as the optimizer was given them.
        communicators: of each flat tensor.

    Raises:
        ValueError: a parameter lies in no flat tensor or in two.
    """

    def __init__(
        self,
        flats: Sequence[Flat],
        parameters: Sequence[Sequence[Tensor]],
        communicators: Sequence[Communicator],
    ) -> None:
        self.rows: Rows = Whole()
        self._flats = list(flats)
        self._per_flat = list(communicators)
        self._places: dict[int, int] = {}
        for i, flat in enumerate(flats):
            for parameter in flat.slots:
                if id(parameter) in self._places:
                    raise ValueError("a parameter lies in two flat tensors")
                self._places[id(parameter)] = i
        self._step_units = []
        for i, flat in enumerate(flats):
            group = parameters[flat.group]
            positions = [k for k, p in enumerate(group) if self._places.get(id(p)) == i]
            self._step_units.append(StepUnit(i, flat.group, positions))
        missing = sum(id(p) not in self._places for group in parameters for p in group)
        if missing:
            raise ValueError(f"{missing} parameters lie in no flat tensor")

    @property
    def tensors(self) -> list[Tensor]:
        """The flat tensors."""
        return [flat.tensor for flat in self._flats]

    @property
    def communicators(self) -> list[Communicator]:
        """Those of the flat tensors."""
        return list({id(c): c for c in self._per_flat}.values())

    is_divided: bool = True

    @property
    def is_first_replica(self) -> bool:
        """There is one replica."""
        return True

    def interval(self, parameter: Tensor) -> tuple[int | None, int]:
        """Elements."""
        place = self._places[id(parameter)]
        return -1, self._flats[place].slots[parameter].pieces[self._per_flat[place].rank][0]

    def holding(self, parameter: Tensor, block: Block) -> Holding:
        """Whole, or rows of it."""
        place = self._places[id(parameter)]
        flat, communicator = self._flats[place], self._per_flat[place]
        whole = getattr(parameter, "ds_shape", parameter.shape)  # ZeRO-3 has emptied the parameter
        slot = _block_slot(block, flat.slots[parameter], communicator.rank, whole)
        return Slice(flat, slot, block.shape, communicator.rank)

    def lanes(self, members: Sequence[Member], rule: Rule, options: Mapping[str, Any]) -> list[Lane]:
        """One lane without communication for what lies whole here; one for what several ranks hold, or several
        where that has to be brought together."""
        if not members:
            return []
        communicator = self._per_flat[self._places[id(members[0].parameter)]]
        here = [m for m in members if m.holding.split is None and m.holding.shape == m.block.shape]
        shared = [m for m in members if m.holding.split is not None]
        lanes: list[Lane] = []
        if here:
            banks = make_banks(here, options, lambda m: local_shapes(m, rule, options, in_fp32=True))
            lanes.append(LocalLane(banks, Whole()))
        if not shared:
            return lanes
        fits = [_in_rows(_slice(m), rule, options, communicator.size) for m in shared]
        in_rows = [m for m, is_fit in zip(shared, fits) if is_fit]
        if in_rows:
            lanes.append(RowLane(in_rows, communicator, rule, options))
        brought = [m for m, is_fit in zip(shared, fits) if not is_fit]
        pieces = [_slice(m).slot.pieces for m in brought]
        owners = [_owner(i, p) for i, p in enumerate(pieces)]
        for chosen in buckets(brought, owners):
            lanes.append(
                OwnerLane(
                    [_as_piece(brought[i]) for i in chosen],
                    [pieces[i] for i in chosen],
                    [owners[i] for i in chosen],
                    communicator,
                    rule,
                    options,
                )
            )
        return lanes

    def step_units(self, groups: Sequence[Mapping[str, Any]]) -> Iterable[StepUnit]:
        """The flat tensors that the groups hold now: DeepSpeed narrows them to one at a time."""
        now = {id(tensor) for group in groups for tensor in group["params"]}
        return [s for s, flat in zip(self._step_units, self._flats) if id(flat.tensor) in now]

    def all_step_units(self, groups: Sequence[Mapping[str, Any]]) -> Iterable[StepUnit]:
        """Every flat tensor."""
        return self._step_units

    def check(self, named: Sequence[tuple[str, Tensor]]) -> None:
        """Nothing starts later: see `Optimizer.step`."""

    def agree(self, unit: StepUnit, flags: Tensor) -> Tensor:
        """Element-wise or over the ranks of the flat tensor."""
        assert isinstance(unit.key, int)
        communicator = self._per_flat[unit.key]
        return communicator.any(flags) if communicator.size > 1 else flags

    def weight(self, parameter: Tensor) -> Tensor:
        """What this rank has of it, 1-D."""
        return self.part_of(parameter, self.flat_of(parameter).detach())

    def gradient(self, parameter: Tensor) -> Tensor | None:
        """The gradient of that."""
        gradient = self.flat_of(parameter).grad
        return None if gradient is None else self.part_of(parameter, gradient)

    def flat_of(self, parameter: Tensor) -> Tensor:
        """The flat tensor that a parameter's elements here lie in."""
        return self._flats[self._places[id(parameter)]].tensor

    def part_of(self, parameter: Tensor, flat: Tensor) -> Tensor:
        """A parameter's elements in a tensor that is laid out like its flat one: a view."""
        place = self._places[id(parameter)]
        slot = self._flats[place].slots[parameter]
        lo, hi = slot.pieces[self._per_flat[place].rank]
        return flat[slot.at : slot.at + hi - lo]


class Slice:
    """`Holding` of a matrix in a flat tensor.

    Whole where this rank has all of it, or where another one has (then with 0 rows). Else the rows whose first
    element this rank has, of which the last may end on the next rank: `tail` is what arrived of it.

    Args:
        flat: the flat tensor.
        slot: of the matrix.
        shape: of the whole matrix.
        rank: of this process among the pieces.
    """

    def __init__(self, flat: Flat, slot: Slot, shape: tuple[int, int], rank: int) -> None:
        m, n = shape
        self.flat, self.slot, self.rank = flat, slot, rank
        self.rows_of_all, self.columns = m, n
        owners = [q for q, (lo, hi) in enumerate(slot.pieces) if hi > lo]
        is_whole = len(owners) == 1
        self.split: int | None = None if is_whole else 0
        rows = [snapped(piece, n) for piece in slot.pieces]
        self.pattern: Hashable = None if is_whole else tuple((r0, r1 - r0) for r0, r1 in rows)
        self.piece = slot.pieces[rank]
        if is_whole:
            self.start, self.shape = 0, (shape if owners == [rank] else (0, n))
            self.rows = (0, m) if owners == [rank] else (0, 0)
        else:
            self.rows = rows[rank]
            self.start, self.shape = self.rows[0], (self.rows[1] - self.rows[0], n)
        self.tail: Tensor | None = None

    @property
    def lead(self) -> Interval:
        """Elements here that end a row of an earlier rank."""
        lo, hi = self.piece
        return lo, min(hi, max(lo, self.rows[0] * self.columns)) if hi > lo else lo

    @property
    def missing(self) -> Interval:
        """Elements of this rank's last row that later ranks have."""
        hi = self.piece[1]
        end = self.rows[1] * self.columns
        return (hi, end) if self.shape[0] and end > hi else (hi, hi)

    def within(self, flat: Tensor, interval: Interval) -> Tensor:
        """An interval of this rank's piece, as a view of a flat tensor."""
        offset = self.slot.at - self.piece[0]
        return flat[offset + interval[0] : offset + interval[1]]

    def gradient(self, parameter: Tensor, block: Block) -> Tensor | None:
        """(rows, n)."""
        gradient = self.flat.tensor.grad
        if gradient is None:
            return None
        own = self.within(gradient, (max(self.piece[0], self.rows[0] * self.columns), self.piece[1]))
        if self.shape[0] == 0:
            return gradient.new_empty(self.shape)
        if self.tail is not None and self.tail.numel():
            own = torch.cat([own, self.tail.to(own.dtype)])
        return own.view(self.shape)

    def weight(self, parameter: Tensor, block: Block) -> Tensor:
        """(rows, n) where no row is broken."""
        start = self.rows[0] * self.columns
        return self.within(self.flat.tensor.detach(), (start, start + self.shape[0] * self.columns)).view(
            self.shape
        )

    def elements(self, parameter: Tensor, block: Block) -> Tensor | None:
        """This rank's piece, broken rows as they lie."""
        gradient = self.flat.tensor.grad
        return None if gradient is None else self.within(gradient, self.piece)

    def part(self, local: Tensor, block: Block) -> Tensor | None:
        """Where a whole parameter is here."""
        is_here = self.split is None and self.shape == block.shape and block.is_whole
        return local.view(self.shape) if is_here else None


class RowLane:
    """Matrices that several ranks hold rows of; broken rows are completed before the step and returned after.

    Args:
        members: in the same order on all ranks, with `Slice` holdings.
        communicator: the ranks.
        rule: a rule with a row form.
        options: of the group.
    """

    def __init__(
        self, members: Sequence[Member], communicator: Communicator, rule: Rule, options: Mapping[str, Any]
    ) -> None:
        shards = Shards(communicator)
        banks = make_banks(
            members, options, lambda m: local_shapes(m, rule, options, in_fp32=True), agree=shards.agree
        )
        self._lane = LocalLane(banks, shards, together=True)
        self.banks: list[Bank] = banks
        self.landing: list[Bank] = []
        self.rows: Rows = shards
        self._members = list(members)
        self._slices = [_slice(m) for m in members]
        views = [
            [Slice(s.flat, s.slot, m.block.shape, rank) for rank in range(communicator.size)]
            for s, m in zip(self._slices, members)
        ]
        leads = [[view.lead for view in same] for same in views]
        missing = [[view.missing for view in same] for same in views]
        is_broken = any(hi > lo for same in leads for lo, hi in same)
        self._exchange = Exchange(leads, missing, communicator) if is_broken else None
        self._arriving: Arriving | None = None
        self._tails: dict[int, Tensor] = {}
        self._skipped: frozenset[int] = frozenset()

    def begin(self) -> None:
        """Ask for what is missing of broken rows."""
        gradient = self._slices[0].flat.tensor.grad
        if self._exchange is None or self._arriving is not None or gradient is None:
            return
        leads = [s.within(gradient, s.lead) for s in self._slices]
        self._arriving = self._exchange.forward(leads, gradient)

    def batches(self, state: State, mask: StepMask) -> Iterable[list[Entry]]:
        """All stacks together."""
        self._skipped = mask.positions([m.unit for m in self._members])
        if self._arriving is not None:
            for held, tail in zip(self._slices, self._arriving.wait()):
                held.tail = tail
        yield from self._lane.batches(state, mask)

    def apply(self, stack: Stack, delta: Tensor | LowRank, config: ApplyConfig) -> None:
        """Where the own elements are; the rest is kept until the `end`."""
        if self._exchange is None:
            self._lane.apply(stack, delta, config)
            return
        dense = delta.dense(stack) if isinstance(delta, LowRank) else delta
        if stack.masked is not None:
            dense = torch.where(stack.masked, 0.0, dense)
        weights, parts = [], []
        flat = dense.reshape(len(dense), -1).unbind(0)
        for member, part in zip(stepped(stack, stack.members), stepped(stack, flat)):
            held = _slice(member)
            first = held.rows[0] * held.columns
            own = max(held.piece[0], first), min(held.piece[1], held.rows[1] * held.columns)
            if own[1] > own[0]:
                weights.append(held.within(held.flat.tensor.detach(), own))
                parts.append(part[own[0] - first : own[1] - first])
            lo, hi = held.missing
            self._tails[id(held)] = part[lo - first : hi - first].clone()
        if weights:
            descend(weights, parts, config)

    def end(self, config: ApplyConfig) -> None:
        """Return what belongs to broken rows of others, and apply what comes back."""
        if self._exchange is None or self._arriving is None:
            return
        flat = self._slices[0].flat.tensor.detach()
        tails = [self._tails.get(id(held)) for held in self._slices]
        arrived = self._exchange.backward(tails, flat).wait()
        weights = [held.within(flat, held.lead) for held in self._slices]
        pairs = [
            (w, part)
            for i, (w, part) in enumerate(zip(weights, arrived))
            if part.numel() and i not in self._skipped
        ]
        if pairs:
            descend([w for w, _ in pairs], [part for _, part in pairs], config)
        self._arriving, self._tails = None, {}
        for held in self._slices:
            held.tail = None


@dataclass(frozen=True)
class _Piece:
    """A flattened interval of a matrix, as a column: what an owner is sent and what it sends back."""

    held: Slice
    shape: tuple[int, int]
    pattern: Hashable
    split: int | None = 0
    start: int = 0

    def gradient(self, parameter: Tensor, block: Block) -> Tensor | None:
        """(elements, 1)."""
        gradient = self.held.flat.tensor.grad
        return None if gradient is None else self.held.within(gradient, self.held.piece)[:, None]

    def weight(self, parameter: Tensor, block: Block) -> Tensor:
        """(elements, 1)."""
        return self.held.within(self.held.flat.tensor.detach(), self.held.piece)[:, None]

    def elements(self, parameter: Tensor, block: Block) -> Tensor | None:
        """As `gradient`."""
        return self.gradient(parameter, block)

    def part(self, local: Tensor, block: Block) -> Tensor | None:
        """None: it has no rows."""
        return None


def _as_piece(member: Member) -> Member:
    held = _slice(member)
    lo, hi = held.piece
    holding = _Piece(held, (hi - lo, 1), held.slot.pieces)
    return Member(member.parameter, member.block, member.prefix, member.offset, holding)


def _slice(member: Member) -> Slice:
    assert isinstance(member.holding, Slice)
    return member.holding


def snapped(piece: Interval, columns: int) -> Interval:
    """Rows whose first element lies in an interval of elements."""
    lo, hi = piece
    first = -(-lo // columns)
    return first, max(first, -(-hi // columns)) if hi > lo else first


def _in_rows(held: Slice, rule: Rule, options: Mapping[str, Any], ranks: int) -> bool:
    """Whether rows send less than bringing a matrix to its largest holder: sums go to all ranks, pieces only from
    those that hold some."""
    if rule.needs_whole:
        return False
    m, n = held.rows_of_all, held.columns
    moved = m * n - max(hi - lo for lo, hi in held.slot.pieces)
    return rule.row_traffic((m, n), 0, options, ranks) <= 8.0 * moved / ranks


def _owner(index: int, pieces: Sequence[Interval]) -> int:
    """The rank with the largest piece; ties are dealt in turn, or one rank would get all of ZeRO-3's matrices."""
    largest = max(hi - lo for lo, hi in pieces)
    candidates = [rank for rank, (lo, hi) in enumerate(pieces) if hi - lo == largest]
    return candidates[index % len(candidates)]


def _block_slot(block: Block, slot: Slot, rank: int, whole: Sequence[int]) -> Slot:
    """Where a matrix of a fused parameter of shape `whole` lies.

    Raises:
        TypeError: its elements are no interval of the flattened parameter.
    """
    if block.is_whole:
        return slot
    size = block.shape[0] * block.shape[1]
    first = 0 if block.expert is None else block.expert * whole[-2] * whole[-1]
    if block.dim == 0 and block.outer == 1:
        first += block.start * block.shape[1]
    elif block.dim != -1:
        raise TypeError(
            f"{block.name}: this fused projection is no interval of its flattened parameter and cannot be stepped in "
            "slices (ZeRO-1, 2, 3); use ddp, fsdp2 or zero0"
        )
    pieces = tuple((min(max(lo - first, 0), size), min(max(hi - first, 0), size)) for lo, hi in slot.pieces)
    return Slot(pieces, slot.at + max(0, first - slot.pieces[rank][0]))
