"""Buckets whose matrices are computed by one owner each: brought whole to it, or replicated with the work split."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from optimizers.fused_projections import Block
from optimizers.interfaces import Collectives, LowRank, MatrixBatch, MatrixRef, ShardBounds, compute_dtype
from optimizers.layouts.apply import ApplyConfig, apply_update
from optimizers.layouts.batches import (
    BatchEntry,
    OptimizerState,
    batch_entries,
    compensation,
    make_batch_states,
    matrices_per_batch,
)
from optimizers.layouts.communicator import Communicator
from optimizers.layouts.exchange import Arriving, Distribution, Exchange, Gathering, Spread, whole_at
from optimizers.layouts.layout import Unsharded
from optimizers.rule import Rule
from optimizers.skipping import StepMask
from optimizers.update_size import keeps_factors


class _DividedBucket:
    """A bucket in which one owner computes each matrix, keeps its state and sends the update to its weights.

    Args:
        matrices: all matrices of the bucket, in the same order on all ranks, as this process holds them.
        owned: those that this process computes.
        start_sending: starts to send the updates (1-D; None: not computed here) to their weights, in the dtype of a
            tensor.
        rule: what is computed.
        options: of the group.
    """

    def __init__(
        self,
        matrices: Sequence[MatrixRef],
        owned: Sequence[MatrixRef],
        start_sending: Callable[[list[Tensor | None], Tensor], Arriving | Gathering],
        rule: Rule,
        options: Mapping[str, Any],
    ) -> None:
        self.rule = rule
        self.collectives: Collectives = Unsharded()
        self._matrices = list(matrices)
        self._places = {id(matrix): i for i, matrix in enumerate(matrices)}
        self._start_sending = start_sending
        self.batch_states = make_batch_states(owned, options, lambda m: rule.state(m.block.shape, options))
        here = [m for m in matrices if 0 not in m.view.shape]
        self.receivers = make_batch_states(here, options, lambda m: compensation(m, options))
        self._receiving: list[BatchEntry] = []
        self._updates: list[Tensor | None] = [None] * len(self._matrices)
        self._returning: Arriving | Gathering | None = None

    def batches(self, state: OptimizerState, mask: StepMask) -> Iterable[list[BatchEntry]]:
        """Yield the matrices that this process owns, one batch at a time."""
        self._receiving = [
            entry for batch_state in self.receivers for entry in batch_entries(batch_state, state, mask)
        ]
        for batch_state in self.batch_states:
            for entry in batch_entries(batch_state, state, mask):
                yield [entry]

    def send(self) -> None:
        """Start sending the updates to their weights."""
        first = self._matrices[0].parameter
        like = torch.empty(0, dtype=compute_dtype(first), device=first.device)
        self._returning = self._start_sending(self._updates, like)
        self._updates = [None] * len(self._matrices)

    def _apply_received(
        self, delta: Callable[[list[Tensor], MatrixBatch], Tensor | LowRank], config: ApplyConfig
    ) -> None:
        if self._returning is None:
            return
        arrived, self._returning = self._returning.wait(), None
        for entry in self._receiving:
            parts = [arrived[self._places[id(m)]] for m in entry.batch.matrices]
            apply_update(entry.batch, delta(parts, entry.batch), config)
            entry.home.write_back(entry.active, entry.batch)
            entry.batch.release()
        self._receiving = []


class OwnerBucket(_DividedBucket):
    """A bucket that brings each matrix whole to one owner, which sends the update back in parts.

    Args:
        matrices: all matrices of the bucket as this process holds them, in the same order on all ranks.
        sources: which interval of each flattened matrix each rank holds; column by column where columns are
            split.
        owners: rank of each matrix' owner.
        communicator: the ranks.
        rule: what is computed.
        options: of the group.
        replicas: collectives over the owners of the same matrices in other replicas; None: there are none.
    """

    def __init__(
        self,
        matrices: Sequence[MatrixRef],
        sources: Distribution,
        owners: Sequence[int],
        communicator: Communicator,
        rule: Rule,
        options: Mapping[str, Any],
        replicas: Collectives | None = None,
    ) -> None:
        sizes = [m.block.shape[0] * m.block.shape[1] for m in matrices]
        exchange = Exchange(sources, whole_at(owners, sizes, communicator.size), communicator)
        self._gathered: dict[int, Tensor] = {}
        owned_positions = [i for i, owner in enumerate(owners) if owner == communicator.rank]
        owned = [_gathered(matrices[i], i, self._gathered) for i in owned_positions]
        super().__init__(matrices, owned, exchange.backward, rule, options)
        if replicas is not None:
            self.collectives = replicas
        self._exchange = exchange
        self._places.update({id(matrix): i for matrix, i in zip(owned, owned_positions)})
        self._owned = owned  # keeps their ids
        self._arriving: Arriving | None = None

    def begin(self) -> None:
        """Start sending the gradients to the owners, in their own dtype."""
        if self._arriving is not None:
            return
        intervals = [_flat(m.gradient(), m.view.split) for m in self._matrices]
        like = next((flat for flat in intervals if flat is not None), None)
        self._arriving = None if like is None else self._exchange.forward(intervals, like)

    def batches(self, state: OptimizerState, mask: StepMask) -> Iterable[list[BatchEntry]]:
        """Wait for the gradients and yield the matrices that this process owns."""
        if self._arriving is not None:
            self._gathered.update(enumerate(self._arriving.wait()))
            yield from super().batches(state, mask)

    def apply(self, batch: MatrixBatch, delta: Tensor | LowRank, config: ApplyConfig) -> None:
        """Keep the update until the `end`."""
        dense = delta.dense(batch) if isinstance(delta, LowRank) else delta
        for matrix, part in zip(batch.matrices, dense.unbind(0)):
            place = self._places[id(matrix)]
            self._updates[place] = _flat(part, self._matrices[place].view.split)

    def send(self) -> None:
        """Start sending the updates back, and drop the gradients."""
        if self._arriving is not None:
            self._arriving = None
            super().send()
            self._gathered.clear()

    def end(self, config: ApplyConfig) -> None:
        """Apply the updates that arrive."""
        self._apply_received(_in_shape, config)


class WorkSplitBucket(_DividedBucket):
    """A bucket whose work the replicas divide: one process computes each matrix, all apply its update.

    An update travels as factors where the rule has them: r(m + n) numbers instead of mn.

    Args:
        matrices: all matrices of the bucket, in the same order on all ranks; every rank holds them whole.
        owners: rank of each matrix' owner.
        communicator: the replicas.
        rule: what is computed.
        options: of the group.
    """

    def __init__(
        self,
        matrices: Sequence[MatrixRef],
        owners: Sequence[int],
        communicator: Communicator,
        rule: Rule,
        options: Mapping[str, Any],
    ) -> None:
        factors = rule.low_rank_form(matrices[0].block.shape, options)
        self._factors = factors if factors is not None and keeps_factors(factors[1], options) else None
        sizes = [self._payload(m.block.shape) for m in matrices]
        owned = [m for m, owner in zip(matrices, owners) if owner == communicator.rank]
        spread = Spread(owners, sizes, communicator)
        super().__init__(matrices, owned, spread.start, rule, options)

    def _payload(self, shape: tuple[int, int]) -> int:
        return sum(shape) * self._factors[0] if self._factors else shape[0] * shape[1]

    def begin(self) -> None:
        """Do nothing: every process has every gradient."""

    def apply(self, batch: MatrixBatch, delta: Tensor | LowRank, config: ApplyConfig) -> None:
        """Keep the update until the `end`."""
        if isinstance(delta, LowRank) and self._factors is None:
            delta = delta.dense(batch)
        if isinstance(delta, LowRank):
            parts = [torch.cat([a.reshape(-1), b.reshape(-1)]) for a, b in zip(delta.left, delta.right)]
        else:
            parts = [part.reshape(-1) for part in delta.unbind(0)]
        for matrix, part in zip(batch.matrices, parts):
            self._updates[self._places[id(matrix)]] = part

    def send(self) -> None:
        """Start sending the updates to all, if there are gradients."""
        if self._receiving:
            super().send()

    def end(self, config: ApplyConfig) -> None:
        """Apply the updates that arrive."""
        self._apply_received(self._delta, config)

    def _delta(self, parts: list[Tensor], batch: MatrixBatch) -> Tensor | LowRank:
        flat, (m, n) = torch.stack(parts), batch.shape
        if self._factors is None:
            return flat.view(-1, m, n)
        rank, keep = self._factors
        left, right = flat.split([m * rank, n * rank], -1)
        return LowRank(left.reshape(-1, m, rank), right.reshape(-1, rank, n), keep)


@dataclass(frozen=True)
class GatheredView:
    """The view of a matrix that was brought here whole; its weights are elsewhere."""

    shape: tuple[int, int]
    buffers: Mapping[int, Tensor]
    index: int
    is_transposed: bool
    split: int | None = None
    start: int = 0
    shard_bounds: ShardBounds | None = None

    def gradient(self, parameter: Tensor, block: Block) -> Tensor | None:
        """Return the gradient that arrived."""
        flat = self.buffers.get(self.index)
        if flat is None or flat.numel() == 0:
            return None
        m, n = self.shape
        return flat.view(n, m).mT if self.is_transposed else flat.view(m, n)

    def weight(self, parameter: Tensor, block: Block) -> Tensor:
        """Refuse: the weights are on other processes."""
        raise RuntimeError(f"{block.name}: its weights are updated on the processes that hold them")

    def elements(self, parameter: Tensor, block: Block) -> Tensor | None:
        """Return the gradient that arrived."""
        return self.gradient(parameter, block)

    def held(self, parameter: Tensor, block: Block) -> Tensor:
        """Refuse: the weights are on other processes."""
        return self.weight(parameter, block)

    def part(self, local: Tensor, block: Block) -> Tensor | None:
        """Return None: the parameter is not here."""
        return None


def _gathered(matrix: MatrixRef, index: int, buffers: Mapping[int, Tensor]) -> MatrixRef:
    view = GatheredView(matrix.block.shape, buffers, index, matrix.view.split == 1)
    return MatrixRef(matrix.parameter, matrix.block, matrix.prefix, matrix.offset, view)


def _flat(part: Tensor | None, split: int | None) -> Tensor | None:
    """Flatten a part so that a rank holds one interval of the matrix."""
    if part is None:
        return None
    return (part.mT if split == 1 else part).reshape(-1)


def _in_shape(parts: list[Tensor], batch: MatrixBatch) -> Tensor:
    """Invert `_flat` and stack the parts."""
    m, n = batch.matrices[0].view.shape
    flat = torch.stack(parts)
    return flat.view(-1, n, m).mT if batch.split == 1 else flat.view(-1, m, n)


def bucket_positions(matrices: Sequence[MatrixRef], owners: Sequence[int]) -> Iterable[list[int]]:
    """Yield the positions of matrices that share a bucket: one shape, at most one batch for each owner."""
    kinds: dict[tuple[Any, ...], list[int]] = {}
    for i, matrix in enumerate(matrices):
        p, block = matrix.parameter, matrix.block
        kinds.setdefault((block.shape, block.transposed, p.dtype, p.device, matrix.view.split), []).append(i)
    for same in kinds.values():
        size = matrices_per_batch(matrices[same[0]], matrices[same[0]].block.shape)
        buckets: list[list[int]] = []
        count: dict[int, int] = {}
        for i in same:
            number = count.get(owners[i], 0)
            count[owners[i]] = number + 1
            while len(buckets) <= number // size:
                buckets.append([])
            buckets[number // size].append(i)
        yield from buckets
