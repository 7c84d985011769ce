"""How a layout steps the matrices of a group: units, buckets, and the driver that answers the requests of rules.

A layout says which part of each matrix this process holds and puts the matrices into buckets. The optimizer steps one
bucket after the other; `run_updates` runs the rule on the batches of a bucket.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from optimizers.fused_projections import Block
from optimizers.interfaces import (
    AllReduce,
    BroadcastBasis,
    Collectives,
    GatherPolar,
    InTurn,
    LocalView,
    LowRank,
    MatrixBatch,
    MatrixRef,
    Request,
    SolveRoot,
    Steps,
    Update,
)
from optimizers.layouts.apply import ApplyConfig, apply_update
from optimizers.layouts.batches import BatchEntry, BatchState, OptimizerState, batch_entries, compensation
from optimizers.layouts.communicator import Communicator
from optimizers.linalg.inverse_root import InverseRoot
from optimizers.linalg.polar import Polar
from optimizers.linalg.requests import answer_alone, drive
from optimizers.rule import Rule
from optimizers.skipping import StepMask
from optimizers.update_size import resized, sets_size


class StepUnit(NamedTuple):
    """Parameters that one call of `step` updates: a group, or part of one.

    Attributes:
        key: names it.
        group: index of the group.
        positions: of its parameters in the group, as the optimizer was given it.
    """

    key: Hashable
    group: int
    positions: list[int]


class Bucket(Protocol):
    """Batches that take a step together, and the way of their updates to the weights.

    All processes step the same buckets in the same order, whatever they hold of them: `begin`, `send` and `end` are
    collectives, and so are the answers to the rule's requests.

    Attributes:
        rule: how its matrices move.
        batch_states: what this process computes and keeps the state of.
        receivers: the weights of this process whose update another one computes.
        collectives: what answers the rule's requests.
    """

    rule: Rule
    batch_states: list[BatchState]
    receivers: list[BatchState]
    collectives: Collectives

    def begin(self) -> None:
        """Start moving gradients to where they are needed, without waiting."""
        ...

    def batches(self, state: OptimizerState, mask: StepMask) -> Iterable[list[BatchEntry]]:
        """Yield lists of the batches that have gradients; the batches of one list run in lock step."""
        ...

    def apply(self, batch: MatrixBatch, delta: Tensor | LowRank, config: ApplyConfig) -> None:
        """Apply the update of a batch to the weights, now or at the `end`."""
        ...

    def send(self) -> None:
        """Start moving the updates that `apply` kept to their weights, without waiting."""
        ...

    def end(self, config: ApplyConfig) -> None:
        """Finish the step: apply the updates that arrive. The next bucket was computed in the meantime."""
        ...


class LocalBucket:
    """A bucket whose process updates the weights for which it computes the update.

    Args:
        rule: how the matrices move.
        batch_states: all batches.
        collectives: what answers the rule's requests.
        together: all batches are run in lock step, because each of their requests communicates.
    """

    def __init__(
        self, rule: Rule, batch_states: list[BatchState], collectives: Collectives, together: bool = False
    ) -> None:
        self.rule, self.batch_states, self.collectives = rule, batch_states, collectives
        self.receivers: list[BatchState] = []
        self._together = together

    def begin(self) -> None:
        """Do nothing: the gradients are here."""

    def batches(self, state: OptimizerState, mask: StepMask) -> Iterable[list[BatchEntry]]:
        """Yield one batch at a time, so that one batch's transients are alive; all that share a collective together.

        Batches of one list do not keep their copy of the gradients, but read them again.
        """
        entries = [
            entry for batch_state in self.batch_states for entry in batch_entries(batch_state, state, mask)
        ]
        if self._together:
            shared = entries
        else:
            shared = (
                [entry for entry in entries if entry.batch.due] if self.collectives.exchanges_bases else []
            )
        for entry in shared:
            entry.batch.keep_gradient = len(shared) == 1
        if shared:
            yield shared
        in_shared = {id(entry) for entry in shared}
        yield from ([entry] for entry in entries if id(entry) not in in_shared)

    def apply(self, batch: MatrixBatch, delta: Tensor | LowRank, config: ApplyConfig) -> None:
        """Apply it at once."""
        apply_update(batch, delta, config)

    def send(self) -> None:
        """Do nothing: the weights are here."""

    def end(self, config: ApplyConfig) -> None:
        """Do nothing: each update is applied."""


class Layout(Protocol):
    """How the parameters are distributed over the processes."""

    @property
    def collectives(self) -> Collectives:
        """Return the collectives over the processes that hold the other parts of the matrices."""
        ...

    @property
    def is_divided(self) -> bool:
        """Return True if processes keep the state of different matrices, or of different parts of them."""
        ...

    @property
    def is_first_replica(self) -> bool:
        """Return True if this process writes what several of them hold alike."""
        ...

    @property
    def replicas(self) -> Communicator | None:
        """Return the processes that hold the same elements of the parameters; None where no other process does."""
        ...

    def interval(self, parameter: Tensor) -> tuple[int | None, int]:
        """Return (dimension, start) of the part that `weight` returns: None: all; -1: of the flattened elements."""
        ...

    @property
    def communicators(self) -> list[Communicator]:
        """Return the communicators, which count the bytes that this process sends for the optimizer."""
        ...

    def local_view(self, parameter: Tensor, block: Block) -> LocalView:
        """Return this process' view of a matrix.

        Raises:
            TypeError: it cannot be stepped in this layout; says why.
        """
        ...

    def buckets(self, matrices: Sequence[MatrixRef], rule: Rule, options: Mapping[str, Any]) -> list[Bucket]:
        """Return the buckets of a unit's matrices, the same on all processes."""
        ...

    def step_units(self, groups: Sequence[Mapping[str, Any]]) -> Iterable[StepUnit]:
        """Return the units to be stepped now, with these parameter groups."""
        ...

    def all_step_units(self, groups: Sequence[Mapping[str, Any]]) -> Iterable[StepUnit]:
        """Return the units of a whole optimizer step."""
        ...

    def check(self, named: Sequence[tuple[str, Tensor]]) -> None:
        """Refuse parameters that are distributed unlike those for which the layout was built.

        Raises:
            TypeError: naming the parameter.
        """
        ...

    def agree(self, unit: StepUnit, flags: Tensor) -> Tensor:
        """Reduce (k,) bool flags by an element-wise or over the processes that hold parts of these gradients.

        A collective where there are several.
        """
        ...

    def sum_parts(self, unit: StepUnit, values: Tensor) -> Tensor:
        """Sum (k,) numbers over the processes that hold parts of a unit's parameters, each element by one of them.

        A collective where there are several.
        """
        ...

    def is_writer(self, unit: StepUnit) -> bool:
        """Return True on one of the processes that hold parts or copies of a unit's parameters."""
        ...

    def weight(self, parameter: Tensor) -> Tensor:
        """Return a view of the parameter's elements here, for element-wise updates."""
        ...

    def gradient(self, parameter: Tensor) -> Tensor | None:
        """Return the gradient of these elements."""
        ...


class Unattached:
    """The layout of an optimizer that waits for DeepSpeed to partition its parameters; it steps nothing."""

    def __init__(self) -> None:
        self.collectives: Collectives = Unsharded()
        self.communicators: list[Communicator] = []

    is_first_replica: bool = False
    is_divided: bool = True
    replicas: Communicator | None = None

    def interval(self, parameter: Tensor) -> tuple[int | None, int]:
        """Return (None, 0): not known yet."""
        return None, 0

    def local_view(self, parameter: Tensor, block: Block) -> LocalView:
        """Refuse: not known yet.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError(
            "the optimizer was built for partitioned parameters and is not attached to an engine"
        )

    def buckets(self, matrices: Sequence[MatrixRef], rule: Rule, options: Mapping[str, Any]) -> list[Bucket]:
        """Return an empty list."""
        return []

    def step_units(self, groups: Sequence[Mapping[str, Any]]) -> Iterable[StepUnit]:
        """Return an empty list."""
        return []

    def all_step_units(self, groups: Sequence[Mapping[str, Any]]) -> Iterable[StepUnit]:
        """Return an empty list."""
        return []

    def check(self, named: Sequence[tuple[str, Tensor]]) -> None:
        """Accept all: no parameter starts later (see `Optimizer.step`)."""

    def agree(self, unit: StepUnit, flags: Tensor) -> Tensor:
        """Return the flags themselves."""
        return flags

    def sum_parts(self, unit: StepUnit, values: Tensor) -> Tensor:
        """Return the numbers themselves."""
        return values

    def is_writer(self, unit: StepUnit) -> bool:
        """Return False."""
        return False

    def weight(self, parameter: Tensor) -> Tensor:
        """Return the whole parameter."""
        return parameter

    def gradient(self, parameter: Tensor) -> Tensor | None:
        """Return None, because nothing is stepped yet."""
        return None


def owner_traffic(shape: tuple[int, int], ranks: int) -> float:
    """Return the bytes that a rank sends in a step to bring one fp32 matrix to its owner and the update back."""
    return 8.0 * shape[0] * shape[1] * (ranks - 1) / ranks**2


def traffic(
    rule: Rule, shape: tuple[int, int], split: int, options: Mapping[str, Any], ranks: int
) -> tuple[float, bool]:
    """Return the bytes that a rank sends for one matrix in the cheaper scheme, and True if that is the row form."""
    rows, whole = rule.sharded_step_bytes(shape, split, options, ranks), owner_traffic(shape, ranks)
    return (whole, False) if rule.needs_whole or whole < rows else (rows, True)


def local_shapes(
    matrix: MatrixRef, rule: Rule, options: Mapping[str, Any], in_fp32: bool = False
) -> dict[str, tuple[int, ...]]:
    """Return kind → shape of a matrix' state on this process, with what stays with the weights.

    Args:
        in_fp32: the weights that are stepped are fp32, whatever the parameter's dtype is.
    """
    shapes, view = rule.state(matrix.block.shape, options), matrix.view
    if view.split is not None:
        axes = rule.axes(matrix.block.shape, options)
        here = view.shape[view.split]
        shapes = {
            kind: tuple(here if axis == view.split else size for size, axis in zip(shape, axes[kind]))
            for kind, shape in shapes.items()
        }
    return shapes if in_fp32 else {**shapes, **compensation(matrix, options)}


def state_splits(matrix: MatrixRef, rule: Rule, options: Mapping[str, Any]) -> dict[str, int]:
    """Return kind → dimension of which this process holds an interval, of the states that have one."""
    split = matrix.view.split
    if split is None:
        return {}
    axes = rule.axes(matrix.block.shape, options)
    return {kind: along.index(split) for kind, along in axes.items() if split in along}


def whole_groups(groups: Sequence[Mapping[str, Any]]) -> list[StepUnit]:
    """Return each parameter group as one unit."""
    return [StepUnit(i, i, list(range(len(group["params"])))) for i, group in enumerate(groups)]


def run_updates(
    rule: Rule, batches: Sequence[MatrixBatch], collectives: Collectives
) -> Iterator[tuple[MatrixBatch, Update]]:
    """Run a rule on batches in lock step; yield each update before the next batch is resumed.

    In each phase every batch yields one request (or a list); equal ones of all batches become one collective.
    """
    running = [(batch, _steps(rule, batch)) for batch in batches]
    replies: deque[Any] = deque([None] * len(running))
    while running:
        paused, requests = [], []
        for batch, steps in running:
            try:
                request = steps.send(replies.popleft())
            except StopIteration as end:
                yield batch, end.value
                continue
            if isinstance(request, InTurn):
                yield batch, drive(steps, lambda request: answer([request], collectives)[0])
                continue
            paused.append((batch, steps))
            requests.append(request)
        running, replies = paused, answer(requests, collectives)


def _steps(rule: Rule, batch: MatrixBatch) -> Steps[Update]:
    # A plain function does its work when it is called, so it is called when its turn has come.
    update = rule.update(batch)
    if isinstance(update, Generator):
        update = yield from update
    return (yield from resized(batch, update)) if sets_size(batch.options) else update


_KINDS = (AllReduce, SolveRoot, BroadcastBasis, GatherPolar)
"""What a rule may yield besides `InTurn`; in this order, the same on all ranks, a phase becomes collectives."""


def answer(requests: Sequence[Request | list[Request]], collectives: Collectives) -> deque[Any]:
    """Answer one phase: one reply for each entry, a list of replies for a list of requests."""
    flat = [one for entry in requests for one in (entry if isinstance(entry, list) else [entry])]
    for one in flat:
        if not isinstance(one, _KINDS):
            raise TypeError(
                f"update yields {one!r:.60}, which is not a request; an Update is returned, not yielded"
            )
    replies: dict[int, Any] = {}
    for kind in _KINDS:
        positions = [i for i, request in enumerate(flat) if isinstance(request, kind)]
        if positions:
            replies.update(zip(positions, _collective(kind, [flat[i] for i in positions], collectives)))
    ordered = iter([replies[i] for i in range(len(flat))])
    return deque(
        [next(ordered) for _ in entry] if isinstance(entry, list) else next(ordered) for entry in requests
    )


def _collective(kind: type, requests: list[Any], collectives: Collectives) -> list[Any]:
    if kind is AllReduce:
        return collectives.all_reduce([r.tensor for r in requests], [r.partial for r in requests])
    if kind is SolveRoot:
        return collectives.inverse_roots(requests)
    if kind is BroadcastBasis:
        return collectives.broadcast_bases(requests)
    return collectives.polar_factors(requests)


class Unsharded:
    """The collectives of one process: every sum is complete, every basis is made here."""

    exchanges_bases = False

    def all_reduce(self, tensors: Sequence[Tensor], partial: Sequence[bool] | None = None) -> list[Tensor]:
        """Return the tensors themselves."""
        return list(tensors)

    def inverse_roots(self, requests: Sequence[SolveRoot]) -> list[InverseRoot]:
        """Solve here: a smooth map of numbers that all replicas share bit by bit."""
        return [request.solver(request.gram) for request in requests]

    def polar_factors(self, requests: Sequence[GatherPolar]) -> list[Polar]:
        """Compute the factors on this process."""
        return [request.solve(request.moment) for request in requests]

    def broadcast_bases(self, requests: Sequence[BroadcastBasis]) -> list[Tensor]:
        """Compute the bases on this process."""
        return [make_basis(request) for request in requests]


def make_basis(request: BroadcastBasis) -> Tensor:
    """Compute a basis where nothing is split."""
    basis = request.maker()
    return basis if isinstance(basis, Tensor) else drive(basis, answer_alone)
