"""How the requests of rules are answered: all batches in lock step, and the answers where nothing is split."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator, Sequence
from typing import Any

from torch import Tensor

from optimizers.interfaces import (
    AllReduce,
    BroadcastBasis,
    Collectives,
    GatherPolar,
    InTurn,
    MatrixBatch,
    Request,
    Rule,
    SolveRoot,
    Steps,
    Update,
)
from optimizers.linalg.inverse_root import InverseRoot
from optimizers.linalg.polar import Polar
from optimizers.linalg.requests import answer_alone, drive


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
    return (yield from update) if isinstance(update, Generator) else update


def answer(requests: Sequence[Request | list[Request]], collectives: Collectives) -> deque[Any]:
    """Answer one phase: one reply for each entry, a list of replies for a list of requests."""
    flat = [one for entry in requests for one in (entry if isinstance(entry, list) else [entry])]
    replies: dict[int, Any] = {}
    for kind in (AllReduce, SolveRoot, BroadcastBasis, GatherPolar):
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
        """Solve here."""
        return [request.solve(request.moment) for request in requests]

    def broadcast_bases(self, requests: Sequence[BroadcastBasis]) -> list[Tensor]:
        """Make them here."""
        return [make_basis(request) for request in requests]


def make_basis(request: BroadcastBasis) -> Tensor:
    """Compute a basis where nothing is split."""
    basis = request.maker()
    return basis if isinstance(basis, Tensor) else drive(basis, answer_alone)
