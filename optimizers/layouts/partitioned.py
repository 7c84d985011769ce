"""Parameters laid end to end in flat tensors that are cut over ranks without regard to rows (ZeRO-1, 2, 3).

Most matrices lie whole on one rank and are stepped there, alone. A matrix across a boundary is stepped in rows
by all who hold some: the rank that holds a row's first element takes the row, and only what is missing of that
row travels. A rule without a row form gets such a matrix whole at one of its holders.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from optimizers.fused_projections import Block
from optimizers.interfaces import Collectives, LocalView, LowRank, MatrixBatch, MatrixRef, ShardBounds
from optimizers.layouts.apply import ApplyConfig, descend, stepped
from optimizers.layouts.batches import BatchEntry, BatchState, OptimizerState, make_batch_states
from optimizers.layouts.communicator import Communicator
from optimizers.layouts.exchange import Arriving, Exchange, Interval
from optimizers.layouts.layout import (
    Bucket,
    LocalBucket,
    StepUnit,
    Unsharded,
    local_shapes,
    state_splits,
)
from optimizers.layouts.owner_buckets import OwnerBucket, bucket_positions
from optimizers.layouts.sharded import ShardCollectives
from optimizers.rule import Rule
from optimizers.skipping import StepMask


@dataclass(frozen=True)
class Slot:
    """The element intervals of a parameter on all ranks, and where this rank's begins in its flat tensor."""

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
        self.collectives: Collectives = Unsharded()
        self._flats = list(flats)
        self._per_flat = list(communicators)
        self._places: dict[int, int] = {}
        for i, flat in enumerate(flats):
            for parameter in flat.slots:
                if id(parameter) in self._places:
                    raise ValueError("a parameter is in two flat tensors")
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
        """Return the flat tensors."""
        return [flat.tensor for flat in self._flats]

    @property
    def communicators(self) -> list[Communicator]:
        """Return the communicators of the flat tensors."""
        return list({id(c): c for c in self._per_flat}.values())

    is_divided: bool = True
    replicas: Communicator | None = None

    @property
    def is_first_replica(self) -> bool:
        """Return True: there is one replica."""
        return True

    def interval(self, parameter: Tensor) -> tuple[int | None, int]:
        """Return -1 and the first element here."""
        place = self._places[id(parameter)]
        return -1, self._flats[place].slots[parameter].pieces[self._per_flat[place].rank][0]

    def local_view(self, parameter: Tensor, block: Block) -> LocalView:
        """Return a view of all of it, or of rows."""
        place = self._places[id(parameter)]
        flat, communicator = self._flats[place], self._per_flat[place]
        whole = getattr(parameter, "ds_shape", parameter.shape)  # ZeRO-3 has emptied the parameter
        slot = _block_slot(block, flat.slots[parameter], communicator.rank, whole)
        return FlatSliceView(flat, slot, block.shape, communicator.rank)

    def buckets(self, matrices: Sequence[MatrixRef], rule: Rule, options: Mapping[str, Any]) -> list[Bucket]:
        """Return a bucket for matrices that are whole here, one for those stepped in rows, and owner buckets."""
        if not matrices:
            return []
        communicator = self._per_flat[self._places[id(matrices[0].parameter)]]
        here = [m for m in matrices if m.view.split is None and m.view.shape == m.block.shape]
        shared = [m for m in matrices if m.view.split is not None]
        buckets: list[Bucket] = []
        if here:
            batch_states = make_batch_states(
                here, options, lambda m: local_shapes(m, rule, options, in_fp32=True)
            )
            buckets.append(LocalBucket(rule, batch_states, Unsharded()))
        if not shared:
            return buckets
        fits = [_in_rows(_flat_view(m), rule, options, communicator.size) for m in shared]
        in_rows = [m for m, is_fit in zip(shared, fits) if is_fit]
        if in_rows:
            buckets.append(RowBucket(in_rows, communicator, rule, options))
        gathered = [m for m, is_fit in zip(shared, fits) if not is_fit]
        pieces = [_flat_view(m).slot.pieces for m in gathered]
        owners = [_owner(i, p) for i, p in enumerate(pieces)]
        for positions in bucket_positions(gathered, owners):
            buckets.append(
                OwnerBucket(
                    [_as_piece(gathered[i]) for i in positions],
                    [pieces[i] for i in positions],
                    [owners[i] for i in positions],
                    communicator,
                    rule,
                    options,
                )
            )
        return buckets

    def step_units(self, groups: Sequence[Mapping[str, Any]]) -> Iterable[StepUnit]:
        """Return the flat tensors that the groups hold now: DeepSpeed narrows them to one at a time."""
        now = {id(tensor) for group in groups for tensor in group["params"]}
        return [s for s, flat in zip(self._step_units, self._flats) if id(flat.tensor) in now]

    def all_step_units(self, groups: Sequence[Mapping[str, Any]]) -> Iterable[StepUnit]:
        """Return every flat tensor."""
        return self._step_units

    def check(self, named: Sequence[tuple[str, Tensor]]) -> None:
        """Accept all: no parameter starts later (see `Optimizer.step`)."""

    def agree(self, unit: StepUnit, flags: Tensor) -> Tensor:
        """Reduce flags by an element-wise or over the ranks of the flat tensor."""
        assert isinstance(unit.key, int)
        communicator = self._per_flat[unit.key]
        return communicator.any(flags) if communicator.size > 1 else flags

    def sum_parts(self, unit: StepUnit, values: Tensor) -> Tensor:
        """Sum over the ranks of the flat tensor."""
        assert isinstance(unit.key, int)
        return self._per_flat[unit.key].sum(values)

    def is_writer(self, unit: StepUnit) -> bool:
        """Return True on the first rank of the flat tensor."""
        assert isinstance(unit.key, int)
        return self._per_flat[unit.key].rank == 0

    def weight(self, parameter: Tensor) -> Tensor:
        """Return this rank's elements of it, 1-D."""
        return self.part_of(parameter, self.flat_of(parameter).detach())

    def gradient(self, parameter: Tensor) -> Tensor | None:
        """Return the gradient of these elements."""
        gradient = self.flat_of(parameter).grad
        return None if gradient is None else self.part_of(parameter, gradient)

    def flat_of(self, parameter: Tensor) -> Tensor:
        """Return the flat tensor that holds a parameter's elements here."""
        return self._flats[self._places[id(parameter)]].tensor

    def part_of(self, parameter: Tensor, flat: Tensor) -> Tensor:
        """Return a view of a parameter's elements in a tensor that is laid out like its flat one."""
        place = self._places[id(parameter)]
        slot = self._flats[place].slots[parameter]
        lo, hi = slot.pieces[self._per_flat[place].rank]
        return flat[slot.at : slot.at + hi - lo]


class FlatSliceView:
    """`LocalView` of a matrix in a flat tensor.

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
        self.row_count, self.columns = m, n
        owners = [q for q, (lo, hi) in enumerate(slot.pieces) if hi > lo]
        is_whole = len(owners) == 1
        self.split: int | None = None if is_whole else 0
        rows = [snapped(piece, n) for piece in slot.pieces]
        self.shard_bounds: ShardBounds | None = None if is_whole else tuple((r0, r1 - r0) for r0, r1 in rows)
        self.piece = slot.pieces[rank]
        if is_whole:
            self.start, self.shape = 0, (shape if owners == [rank] else (0, n))
            self.row_range = (0, m) if owners == [rank] else (0, 0)
        else:
            self.row_range = rows[rank]
            self.start, self.shape = self.row_range[0], (self.row_range[1] - self.row_range[0], n)
        self.tail: Tensor | None = None

    @property
    def lead(self) -> Interval:
        """Return the interval of elements here that end a row of an earlier rank."""
        return _lead(self.piece, self.columns)

    @property
    def missing(self) -> Interval:
        """Return the interval of elements of this rank's last row that later ranks have."""
        return _missing(self.piece, self.columns)

    def within(self, flat: Tensor, interval: Interval) -> Tensor:
        """Return an interval of this rank's piece, as a view of a flat tensor."""
        offset = self.slot.at - self.piece[0]
        return flat[offset + interval[0] : offset + interval[1]]

    def gradient(self, parameter: Tensor, block: Block) -> Tensor | None:
        """Return the gradient of the whole rows of this rank, (rows, n)."""
        gradient = self.flat.tensor.grad
        if gradient is None:
            return None
        own = self.within(gradient, (max(self.piece[0], self.row_range[0] * self.columns), self.piece[1]))
        if self.shape[0] == 0:
            return gradient.new_empty(self.shape)
        if self.tail is not None and self.tail.numel():
            own = torch.cat([own, self.tail.to(own.dtype)])
        return own.view(self.shape)

    def weight(self, parameter: Tensor, block: Block) -> Tensor:
        """Return the weights of the whole rows of this rank, (rows, n), if no row crosses its boundary."""
        start = self.row_range[0] * self.columns
        return self.within(self.flat.tensor.detach(), (start, start + self.shape[0] * self.columns)).view(
            self.shape
        )

    def elements(self, parameter: Tensor, block: Block) -> Tensor | None:
        """Return this rank's piece, with broken rows as they are."""
        gradient = self.flat.tensor.grad
        return None if gradient is None else self.within(gradient, self.piece)

    def held(self, parameter: Tensor, block: Block) -> Tensor:
        """Return this rank's piece, 1-D."""
        return self.within(self.flat.tensor.detach(), self.piece)

    def part(self, local: Tensor, block: Block) -> Tensor | None:
        """Return the matrix where its whole parameter is here, else None."""
        is_here = self.split is None and self.shape == block.shape and block.is_whole
        return local.view(self.shape) if is_here else None


class RowBucket:
    """A bucket of matrices whose rows several ranks hold; broken rows are completed before the step.

    Args:
        matrices: in the same order on all ranks, with `FlatSliceView` views.
        communicator: the ranks.
        rule: a rule with a row form.
        options: of the group.
    """

    def __init__(
        self,
        matrices: Sequence[MatrixRef],
        communicator: Communicator,
        rule: Rule,
        options: Mapping[str, Any],
    ) -> None:
        shards = ShardCollectives(communicator)
        batch_states = make_batch_states(
            matrices,
            options,
            lambda m: local_shapes(m, rule, options, in_fp32=True),
            agree=shards.agree,
            splits=lambda m: state_splits(m, rule, options),
        )
        self._bucket = LocalBucket(rule, batch_states, shards, together=True)
        self.rule = rule
        self.batch_states: list[BatchState] = batch_states
        self.receivers: list[BatchState] = []
        self.collectives: Collectives = shards
        self._matrices = list(matrices)
        self._views = [_flat_view(m) for m in matrices]
        pieces_of = [(view.slot.pieces, view.columns) for view in self._views]
        leads = [[_lead(piece, columns) for piece in pieces] for pieces, columns in pieces_of]
        missing = [[_missing(piece, columns) for piece in pieces] for pieces, columns in pieces_of]
        is_broken = any(hi > lo for same in leads for lo, hi in same)
        self._exchange = Exchange(leads, missing, communicator) if is_broken else None
        self._arriving: Arriving | None = None
        self._tails: dict[int, Tensor] = {}
        self._skipped: frozenset[int] = frozenset()

    def begin(self) -> None:
        """Start the exchange that completes broken rows."""
        gradient = self._views[0].flat.tensor.grad
        if self._exchange is None or self._arriving is not None or gradient is None:
            return
        leads = [s.within(gradient, s.lead) for s in self._views]
        self._arriving = self._exchange.forward(leads, gradient)

    def batches(self, state: OptimizerState, mask: StepMask) -> Iterable[list[BatchEntry]]:
        """Complete the broken rows and yield all batches together."""
        self._skipped = mask.positions([m.unit for m in self._matrices])
        if self._arriving is not None:
            for view, tail in zip(self._views, self._arriving.wait()):
                view.tail = tail
        yield from self._bucket.batches(state, mask)

    def apply(self, batch: MatrixBatch, delta: Tensor | LowRank, config: ApplyConfig) -> None:
        """Update this rank's elements; keep the rest until the `end`."""
        if self._exchange is None:
            self._bucket.apply(batch, delta, config)
            return
        dense = delta.dense(batch) if isinstance(delta, LowRank) else delta
        if batch.masked is not None:
            dense = torch.where(batch.masked, 0.0, dense)
        weights, parts = [], []
        flat = dense.reshape(len(dense), -1).unbind(0)
        for matrix, part in zip(stepped(batch, batch.matrices), stepped(batch, flat)):
            view = _flat_view(matrix)
            first = view.row_range[0] * view.columns
            own = max(view.piece[0], first), min(view.piece[1], view.row_range[1] * view.columns)
            if own[1] > own[0]:
                weights.append(view.within(view.flat.tensor.detach(), own))
                parts.append(part[own[0] - first : own[1] - first])
            lo, hi = view.missing
            self._tails[id(view)] = part[lo - first : hi - first].clone()
        if weights:
            descend(weights, parts, config)

    def send(self) -> None:
        """Do nothing: at most one row of each matrix travels, in `end`."""

    def end(self, config: ApplyConfig) -> None:
        """Send back the updates of other ranks' broken rows, and apply those that arrive."""
        if self._exchange is None or self._arriving is None:
            return
        flat = self._views[0].flat.tensor.detach()
        tails = [self._tails.get(id(view)) for view in self._views]
        arrived = self._exchange.backward(tails, flat).wait()
        weights = [view.within(flat, view.lead) for view in self._views]
        pairs = [
            (w, part)
            for i, (w, part) in enumerate(zip(weights, arrived))
            if part.numel() and i not in self._skipped
        ]
        if pairs:
            descend([w for w, _ in pairs], [part for _, part in pairs], config)
        self._arriving, self._tails = None, {}
        for view in self._views:
            view.tail = None


@dataclass(frozen=True)
class FlatPieceView:
    """The view of a flattened interval of a matrix, as a column: sent to the owner and back."""

    view: FlatSliceView
    shape: tuple[int, int]
    shard_bounds: ShardBounds | None
    split: int | None = 0
    start: int = 0

    def gradient(self, parameter: Tensor, block: Block) -> Tensor | None:
        """Return the gradient of this rank's elements, (elements, 1)."""
        gradient = self.view.flat.tensor.grad
        return None if gradient is None else self.view.within(gradient, self.view.piece)[:, None]

    def weight(self, parameter: Tensor, block: Block) -> Tensor:
        """Return the weights of this rank's elements, (elements, 1)."""
        return self.view.within(self.view.flat.tensor.detach(), self.view.piece)[:, None]

    def elements(self, parameter: Tensor, block: Block) -> Tensor | None:
        """Return the same as `gradient`."""
        return self.gradient(parameter, block)

    def held(self, parameter: Tensor, block: Block) -> Tensor:
        """Return the same as `weight`."""
        return self.weight(parameter, block)

    def part(self, local: Tensor, block: Block) -> Tensor | None:
        """Return None: it has no rows."""
        return None


def _as_piece(matrix: MatrixRef) -> MatrixRef:
    view = _flat_view(matrix)
    lo, hi = view.piece
    piece = FlatPieceView(view, (hi - lo, 1), tuple((a, z - a) for a, z in view.slot.pieces))
    return MatrixRef(matrix.parameter, matrix.block, matrix.prefix, matrix.offset, piece)


def _flat_view(matrix: MatrixRef) -> FlatSliceView:
    assert isinstance(matrix.view, FlatSliceView)
    return matrix.view


def snapped(piece: Interval, columns: int) -> Interval:
    """Return the rows whose first element lies in an interval of elements."""
    lo, hi = piece
    first = -(-lo // columns)
    return first, max(first, -(-hi // columns)) if hi > lo else first


def _lead(piece: Interval, columns: int) -> Interval:
    """Return the part of an interval of elements that ends a row of an earlier rank."""
    lo, hi = piece
    first, _ = snapped(piece, columns)
    return lo, min(hi, max(lo, first * columns)) if hi > lo else lo


def _missing(piece: Interval, columns: int) -> Interval:
    """Return the elements after an interval that its last row lacks; empty if no row begins in the interval."""
    hi = piece[1]
    first, end = snapped(piece, columns)
    return hi, max(hi, end * columns) if end > first else hi


def _in_rows(view: FlatSliceView, rule: Rule, options: Mapping[str, Any], ranks: int) -> bool:
    """Return True if rows send less than bringing a matrix to its largest holder.

    Sums go to all ranks, pieces come only from ranks that hold some.
    """
    if rule.needs_whole:
        return False
    m, n = view.row_count, view.columns
    moved = m * n - max(hi - lo for lo, hi in view.slot.pieces)
    return rule.sharded_step_bytes((m, n), 0, options, ranks) <= 8.0 * moved / ranks


def _owner(index: int, pieces: Sequence[Interval]) -> int:
    """Return the rank with the largest piece; ties in turn, or one rank would get all of ZeRO-3's matrices."""
    largest = max(hi - lo for lo, hi in pieces)
    candidates = [rank for rank, (lo, hi) in enumerate(pieces) if hi - lo == largest]
    return candidates[index % len(candidates)]


def _block_slot(block: Block, slot: Slot, rank: int, whole: Sequence[int]) -> Slot:
    """Return where a matrix of a fused parameter of shape `whole` is.

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
            f"{block.name}: this fused projection is not an interval of its flattened parameter and cannot be "
            "stepped in slices (ZeRO-1, 2, 3); use ddp, fsdp2 or zero0"
        )
    pieces = tuple((min(max(lo - first, 0), size), min(max(hi - first, 0), size)) for lo, hi in slot.pieces)
    return Slot(pieces, slot.at + max(0, first - slot.pieces[rank][0]))
