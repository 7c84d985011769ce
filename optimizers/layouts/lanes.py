"""What a layout makes of the matrices of a group: lanes, which the optimizer steps one after the other."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from optimizers.fused_projections import Block
from optimizers.layouts.communicator import Communicator
from optimizers.layouts.exchange import Arriving, Distribution, Exchange, whole_at
from optimizers.layouts.rows import Rows, Whole
from optimizers.members import Member, compute_dtype
from optimizers.rules.rule import Rule
from optimizers.skipping import StepMask
from optimizers.stacks import STACK_BYTES, ApplyConfig, Bank, LowRank, Stack, apply_update

State = Mapping[Tensor, dict[str, Any]]
Entry = tuple[Bank, list[int], Stack]
Shapes = dict[str, tuple[int, ...]]


class Lane(Protocol):
    """Stacks that take a step together, and how their updates reach the weights.

    All processes step the same lanes in the same order, whatever they hold of them: `begin` and `end` are
    collectives, and so are the calls of `rows`.

    Attributes:
        banks: what this process computes and keeps the state of.
        landing: the weights of this process whose update another one computes.
        rows: what the rule asks.
    """

    banks: list[Bank]
    landing: list[Bank]
    rows: Rows

    def begin(self) -> None:
        """Start bringing gradients to where they are needed; does not wait."""
        ...

    def batches(self, state: State, mask: StepMask) -> Iterable[list[Entry]]:
        """The stacks that have gradients, in the batches in which the rule is to be called."""
        ...

    def apply(self, stack: Stack, delta: Tensor | LowRank, config: ApplyConfig) -> None:
        """Take a stack's update to the weights, now or at the `end`."""
        ...

    def end(self, config: ApplyConfig) -> None:
        """Finish the step."""
        ...


class LocalLane:
    """Every process updates the weights that it computes the update of.

    Args:
        banks: all stacks.
        rows: what the rule asks.
        together: the rule is called once for all stacks, because each of its calls of `rows` communicates.
    """

    def __init__(self, banks: list[Bank], rows: Rows, together: bool = False) -> None:
        self.banks, self.rows = banks, rows
        self.landing: list[Bank] = []
        self._together = together

    def begin(self) -> None:
        """Nothing: the gradients are here."""

    def batches(self, state: State, mask: StepMask) -> Iterable[list[Entry]]:
        """One stack at a time, so that one stack's transients are alive; together where they share a
        collective, and then gradients are read again whenever they are needed."""
        entries = [entry for bank in self.banks for entry in entries_of(bank, state, mask)]
        if self._together:
            shared = entries
        else:
            shared = [entry for entry in entries if entry[2].due] if self.rows.exchanges_bases else []
        for _, _, stack in shared:
            stack.keep_gradient = len(shared) == 1
        # A lane without a gradient on this process still takes part in the collectives of the others.
        if shared or self._together:
            yield shared
        taken = {id(entry[2]) for entry in shared}
        yield from ([entry] for entry in entries if id(entry[2]) not in taken)

    def apply(self, stack: Stack, delta: Tensor | LowRank, config: ApplyConfig) -> None:
        """At once."""
        apply_update(stack, delta, config)

    def end(self, config: ApplyConfig) -> None:
        """Nothing is left to do."""


class _DividedLane:
    """Each matrix is computed by one owner, which keeps its state and sends the update to where its weights are.

    Args:
        members: all matrices of the lane, in the same order on all ranks, as this process holds them.
        owned: those that this process computes.
        exchange: from where the weights are to the owners; updates take it backward.
        rule: what is computed.
        options: of the group.
    """

    def __init__(
        self,
        members: Sequence[Member],
        owned: Sequence[Member],
        exchange: Exchange,
        rule: Rule,
        options: Mapping[str, Any],
    ) -> None:
        self.rows: Rows = Whole()
        self._members = list(members)
        self._places = {id(member): i for i, member in enumerate(members)}
        self._exchange = exchange
        self.banks = make_banks(owned, options, lambda m: rule.state(m.block.shape, options))
        here = [m for m in members if 0 not in m.holding.shape]
        self.landing = make_banks(here, options, lambda m: compensation(m, options))
        self._landed: list[Entry] = []
        self._updates: list[Tensor | None] = [None] * len(self._members)

    def batches(self, state: State, mask: StepMask) -> Iterable[list[Entry]]:
        """The matrices that this process owns, one stack at a time."""
        self._landed = [entry for bank in self.landing for entry in entries_of(bank, state, mask)]
        for bank in self.banks:
            for entry in entries_of(bank, state, mask):
                yield [entry]

    def _send_back(self) -> list[Tensor]:
        """What arrives here of each member's update, 1-D."""
        first = self._members[0].parameter
        like = torch.empty(0, dtype=compute_dtype(first), device=first.device)
        arrived = self._exchange.backward(self._updates, like).wait()
        self._updates = [None] * len(self._members)
        return arrived

    def _land(
        self,
        arrived: Sequence[Tensor],
        delta: Callable[[list[Tensor], Stack], Tensor | LowRank],
        config: ApplyConfig,
    ) -> None:
        for bank, active, stack in self._landed:
            parts = [arrived[self._places[id(m)]] for m in stack.members]
            apply_update(stack, delta(parts, stack), config)
            bank.write_back(active, stack.state)
            stack.release()
        self._landed = []


class OwnerLane(_DividedLane):
    """Each matrix is brought whole to one owner, which sends the update back in parts.

    Args:
        members: all matrices of the lane as this process holds them, in the same order on all ranks.
        sources: which interval of each flattened matrix each rank holds; column by column where columns are
            split.
        owners: rank of each matrix' owner.
        communicator: the ranks.
        rule: what is computed.
        options: of the group.
    """

    def __init__(
        self,
        members: Sequence[Member],
        sources: Distribution,
        owners: Sequence[int],
        communicator: Communicator,
        rule: Rule,
        options: Mapping[str, Any],
    ) -> None:
        sizes = [m.block.shape[0] * m.block.shape[1] for m in members]
        exchange = Exchange(sources, whole_at(owners, sizes, communicator.size), communicator)
        self._gathered: dict[int, Tensor] = {}
        mine = [i for i, owner in enumerate(owners) if owner == communicator.rank]
        owned = [_gathered(members[i], i, self._gathered) for i in mine]
        super().__init__(members, owned, exchange, rule, options)
        self._places.update({id(member): i for member, i in zip(owned, mine)})
        self._owned = owned  # keeps their ids
        self._arriving: Arriving | None = None

    def begin(self) -> None:
        """Send the gradients off, in their own dtype."""
        if self._arriving is not None:
            return
        held = [_flat(m.gradient(), m.holding.split) for m in self._members]
        like = next((flat for flat in held if flat is not None), None)
        self._arriving = None if like is None else self._exchange.forward(held, like)

    def batches(self, state: State, mask: StepMask) -> Iterable[list[Entry]]:
        """The matrices that this process owns, once they have arrived."""
        if self._arriving is not None:
            self._gathered.update(enumerate(self._arriving.wait()))
            yield from super().batches(state, mask)

    def apply(self, stack: Stack, delta: Tensor | LowRank, config: ApplyConfig) -> None:
        """Keep the update until the `end`."""
        dense = delta.dense(stack) if isinstance(delta, LowRank) else delta
        for member, part in zip(stack.members, dense.unbind(0)):
            place = self._places[id(member)]
            self._updates[place] = _flat(part, self._members[place].holding.split)

    def end(self, config: ApplyConfig) -> None:
        """Send the updates back and apply what arrives."""
        if self._arriving is None:
            return
        self._arriving = None
        arrived = self._send_back()
        self._gathered.clear()
        self._land(arrived, _in_shape, config)


class SplitLane(_DividedLane):
    """Replicas share the work: one process computes each matrix and keeps its state, all apply its update.

    An update travels as factors where the rule has them: r(m + n) numbers instead of mn.

    Args:
        members: all matrices of the lane, in the same order on all ranks; every rank holds them whole.
        owners: rank of each matrix' owner.
        communicator: the replicas.
        rule: what is computed.
        options: of the group.
    """

    def __init__(
        self,
        members: Sequence[Member],
        owners: Sequence[int],
        communicator: Communicator,
        rule: Rule,
        options: Mapping[str, Any],
    ) -> None:
        self._factors = rule.factors(members[0].block.shape, options)
        sizes = [self._payload(m.block.shape) for m in members]
        everywhere = [[(0, size)] * communicator.size for size in sizes]
        exchange = Exchange(everywhere, whole_at(owners, sizes, communicator.size), communicator)
        owned = [m for m, owner in zip(members, owners) if owner == communicator.rank]
        super().__init__(members, owned, exchange, rule, options)

    def _payload(self, shape: tuple[int, int]) -> int:
        return sum(shape) * self._factors[0] if self._factors else shape[0] * shape[1]

    def begin(self) -> None:
        """Nothing: every process has every gradient."""

    def apply(self, stack: Stack, delta: Tensor | LowRank, config: ApplyConfig) -> None:
        """Keep the update until the `end`."""
        if isinstance(delta, LowRank):
            parts = [torch.cat([a.reshape(-1), b.reshape(-1)]) for a, b in zip(delta.left, delta.right)]
        else:
            parts = [part.reshape(-1) for part in delta.unbind(0)]
        for member, part in zip(stack.members, parts):
            self._updates[self._places[id(member)]] = part

    def end(self, config: ApplyConfig) -> None:
        """Send the updates to all and apply them."""
        if self._landed:
            self._land(self._send_back(), self._delta, config)

    def _delta(self, parts: list[Tensor], stack: Stack) -> Tensor | LowRank:
        flat, (m, n) = torch.stack(parts), stack.shape
        if self._factors is None:
            return flat.view(-1, m, n)
        rank, keep = self._factors
        left, right = flat.split([m * rank, n * rank], -1)
        return LowRank(left.reshape(-1, m, rank), right.reshape(-1, rank, n), keep)


@dataclass(frozen=True)
class _Gathered:
    """A matrix that has been brought here whole; its weights are elsewhere."""

    shape: tuple[int, int]
    buffers: Mapping[int, Tensor]
    index: int
    is_transposed: bool
    split: int | None = None
    start: int = 0
    pattern: Hashable = None

    def gradient(self, parameter: Tensor, block: Block) -> Tensor | None:
        """What arrived."""
        flat = self.buffers.get(self.index)
        if flat is None or flat.numel() == 0:
            return None
        m, n = self.shape
        return flat.view(n, m).mT if self.is_transposed else flat.view(m, n)

    def weight(self, parameter: Tensor, block: Block) -> Tensor:
        """Not here."""
        raise RuntimeError(f"{block.name}: its weights are applied where they lie")

    def elements(self, parameter: Tensor, block: Block) -> Tensor | None:
        """What arrived."""
        return self.gradient(parameter, block)

    def part(self, local: Tensor, block: Block) -> Tensor | None:
        """Not here."""
        return None


def _gathered(member: Member, index: int, buffers: Mapping[int, Tensor]) -> Member:
    holding = _Gathered(member.block.shape, buffers, index, member.holding.split == 1)
    return Member(member.parameter, member.block, member.prefix, member.offset, holding)


def _flat(part: Tensor | None, split: int | None) -> Tensor | None:
    """1-D, so that what a rank holds of the matrix is one interval."""
    if part is None:
        return None
    return (part.mT if split == 1 else part).reshape(-1)


def _in_shape(parts: list[Tensor], stack: Stack) -> Tensor:
    """The inverse of `_flat`, stacked."""
    m, n = stack.members[0].holding.shape
    flat = torch.stack(parts)
    return flat.view(-1, n, m).mT if stack.split == 1 else flat.view(-1, m, n)


def entries_of(bank: Bank, state: State, mask: StepMask) -> list[Entry]:
    """The bank's stack for this step; none where no member has a gradient."""
    active = [i for i, member in enumerate(bank.members) if member.is_stepped]
    if not active:
        return []
    bank.bind(state)
    return [(bank, active, bank.stack(active, state, mask))]


def make_banks(
    members: Sequence[Member],
    options: Mapping[str, Any],
    shapes: Callable[[Member], Shapes],
    agree: Callable[[Tensor], Tensor] | None = None,
) -> list[Bank]:
    """Banks of matrices that are alike and alike held here, of at most `STACK_BYTES` of gradients each.

    Args:
        members: in any mixture.
        options: of their group.
        shapes: kind → shape of the state of one matrix.
        agree: see `Bank`.
    """
    kinds: dict[tuple[Any, ...], list[Member]] = {}
    for member in members:
        p, block, holding = member.parameter, member.block, member.holding
        key = (block.shape, block.transposed, p.dtype, p.device, holding.split, holding.pattern)
        kinds.setdefault(key, []).append(member)
    banks = []
    for same in kinds.values():
        size = members_per_stack(same[0], same[0].holding.shape)
        banks += [
            Bank(same[i : i + size], options, shapes(same[0]), agree) for i in range(0, len(same), size)
        ]
    return banks


def members_per_stack(member: Member, shape: tuple[int, int]) -> int:
    """How many matrices of this shape one stack holds."""
    matrix_bytes = shape[0] * shape[1] * compute_dtype(member.parameter).itemsize
    limit = STACK_BYTES.get(member.parameter.device.type, STACK_BYTES["cuda"])
    return max(1, limit // max(1, matrix_bytes))


def compensation(member: Member, options: Mapping[str, Any]) -> Shapes:
    """The state that stays with the weights: what Kahan's sum carries over."""
    if options["rounding"] != "kahan" or member.parameter.dtype == compute_dtype(member.parameter):
        return {}
    return {"compensation": member.holding.shape}


def buckets(members: Sequence[Member], owners: Sequence[int]) -> Iterable[list[int]]:
    """Positions of the members that share a lane: one shape, and for each owner no more than one stack."""
    kinds: dict[tuple[Any, ...], list[int]] = {}
    for i, member in enumerate(members):
        p, block = member.parameter, member.block
        kinds.setdefault((block.shape, block.transposed, p.dtype, p.device, member.holding.split), []).append(
            i
        )
    for same in kinds.values():
        size = members_per_stack(members[same[0]], members[same[0]].block.shape)
        lanes: list[list[int]] = []
        count: dict[int, int] = {}
        for i in same:
            number = count.get(owners[i], 0)
            count[owners[i]] = number + 1
            while len(lanes) <= number // size:
                lanes.append([])
            lanes[number // size].append(i)
        yield from lanes
