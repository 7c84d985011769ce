"""Parameters cut along one axis over ranks: DTensors of `fully_shard` (FSDP2), also inside of replicas (HSDP).

A rule with a row form never sees a whole matrix: what has to be summed over ranks are r×r Grams or projected
gradients. A rule without one gets whole matrices at owners and back, in one all-to-all each way per bucket.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

from optimizers.fused_projections import Block
from optimizers.interfaces import (
    BroadcastBasis,
    Collectives,
    GatherPolar,
    LocalView,
    MatrixRef,
    SolveRoot,
)
from optimizers.layouts.batches import make_batch_states
from optimizers.layouts.communicator import Communicator
from optimizers.layouts.exchange import Exchange, balanced_owners, whole_at
from optimizers.layouts.layout import (
    Bucket,
    LocalBucket,
    StepUnit,
    local_shapes,
    state_splits,
    traffic,
    whole_groups,
)
from optimizers.layouts.owner_buckets import OwnerBucket, bucket_positions
from optimizers.layouts.replicated import ReplicaCollectives, work_of
from optimizers.layouts.shard_views import chunk, local, shard_view_of
from optimizers.linalg.inverse_root import InverseRoot
from optimizers.linalg.polar import Polar
from optimizers.linalg.requests import AllGather, AllReduce, Eigh, drive
from optimizers.linalg.robust import (
    full_precision,
    robust_eigh,
)
from optimizers.rule import Rule


class ShardCollectives:
    """The collectives over ranks that each hold an interval of every matrix.

    Args:
        communicator: the ranks that hold one replica.
        replicas: processes that hold the same interval of other replicas; None: there is one replica.
    """

    exchanges_bases = True

    def __init__(self, communicator: Communicator, replicas: Communicator | None = None) -> None:
        self._ranks, self._replicas = communicator, replicas
        self._exchanges: dict[Any, tuple[Exchange, set[int]]] = {}

    def all_reduce(self, tensors: Sequence[Tensor], partial: Sequence[bool] | None = None) -> list[Tensor]:
        """Sum the partial tensors: one all-reduce per dtype."""
        result = list(tensors)
        summands = [i for i in range(len(tensors)) if partial is None or partial[i]]
        for dtype in sorted({tensors[i].dtype for i in summands}, key=str):
            positions = [i for i in summands if tensors[i].dtype == dtype]
            flat = self._ranks.sum(torch.cat([tensors[i].reshape(-1) for i in positions]))
            for i, total in zip(positions, flat.split([tensors[i].numel() for i in positions])):
                result[i] = total.view(tensors[i].shape)
        return result

    def inverse_roots(self, requests: Sequence[SolveRoot]) -> list[InverseRoot]:
        """Sum each Gram at one owner, solve it there, and send the root to all.

        In fp32 that is 12r² bytes instead of the 16r² of an all-reduce, with the work divided and the roots equal bit
        by bit. Complete Grams are solved by all: a smooth map of equal numbers.
        """
        solved = iter(self._owned_roots([r for r in requests if r.partial]))
        return [next(solved) if r.partial else r.solver(r.gram) for r in requests]

    def _owned_roots(self, requests: Sequence[SolveRoot]) -> list[InverseRoot]:
        if not requests:
            return []
        grams = [request.gram for request in requests]
        sides = [gram.shape[-1] for gram in grams]
        shares = [_dealt(len(gram), self._ranks.size, start) for start, gram in enumerate(grams)]
        owned = self._ranks.sum_scatter(_packed(grams, shares))
        is_wide = any(request.solver.dtype == torch.float64 for request in requests)
        dtype = torch.float64 if is_wide else torch.float32
        solutions, offset = [], 0
        for r, share, request in zip(sides, shares, requests):
            count = _length(share, self._ranks.rank)
            if count == 0:
                continue
            root = request.solver(owned[offset : offset + count * r * r].view(count, r, r))
            offset += count * r * r
            solutions.append(_packed_root(root).to(dtype).reshape(-1))
        widths = [r * r + r + 2 for r in sides]
        longest = max(sum(w * _length(s, q) for w, s in zip(widths, shares)) for q in range(self._ranks.size))
        flat = torch.zeros(longest, dtype=dtype, device=grams[0].device)
        if solutions:
            own = torch.cat(solutions)
            flat[: own.numel()] = own
        everything = self._ranks.gather(flat)
        return [
            _unpacked_root(rows, r, request.solver.gives_singular_values)
            for rows, r, request in zip(_unpacked(everything, shares, widths), sides, requests)
        ]

    def polar_factors(self, requests: Sequence[GatherPolar]) -> list[Polar]:
        """Bring each moment whole to one owner, longest first, which sends the rows of the factor back."""
        exchange, owned = self._moment_exchange(requests)
        rows = [request.split_first(request.moment) for request in requests]
        intervals = [matrix.reshape(-1) for part in rows for matrix in part.unbind(0)]
        arrived = exchange.forward(intervals, intervals[0]).wait()
        factors: list[Tensor | None] = [None] * len(intervals)
        fallbacks, first = [], 0
        for request in requests:
            positions = [first + i for i in range(len(request.moment)) if first + i in owned]
            first += len(request.moment)
            count = torch.zeros((), dtype=torch.int64, device=request.moment.device)
            if positions:
                solution = request.solve(request.unflatten(torch.stack([arrived[i] for i in positions])))
                count = count if solution.fallbacks is None else solution.fallbacks
                for i, factor in zip(positions, request.split_first(solution.factor).unbind(0)):
                    factors[i] = factor.reshape(-1)
            fallbacks.append(count)
        returned = exchange.backward(factors, intervals[0]).wait()
        result, first = [], 0
        for request, shape, count in zip(requests, (part.shape for part in rows), fallbacks):
            factor = torch.stack([returned[first + i].view(shape[1:]) for i in range(shape[0])])
            first += shape[0]
            result.append(Polar(request.split_first(factor), None, None, count))
        return result

    def _moment_exchange(self, requests: Sequence[GatherPolar]) -> tuple[Exchange, set[int]]:
        key = tuple((len(r.moment), r.shape, r.dim, r.shard_bounds) for r in requests)
        if key not in self._exchanges:
            sources, sizes, costs = [], [], []
            for request in requests:
                width = request.shape[1 if request.dim == -2 else 0]
                length = request.shape[0 if request.dim == -2 else 1]
                for _ in range(len(request.moment)):
                    sources.append([(a * width, (a + n) * width) for a, n in request.shard_bounds])
                    sizes.append(length * width)
                    costs.append(work_of(request.shape))
            owners = balanced_owners(costs, self._ranks.size)
            exchange = Exchange(sources, whole_at(owners, sizes, self._ranks.size), self._ranks)
            owned = {i for i, owner in enumerate(owners) if owner == self._ranks.rank}
            self._exchanges[key] = exchange, owned
        return self._exchanges[key]

    def broadcast_bases(self, requests: Sequence[BroadcastBasis]) -> list[Tensor]:
        """Make the bases one after the other, so that one batch's gradients are alive.

        What each asks is answered by a collective for all matrices of its batch.
        """
        with torch.no_grad():
            return [self._basis(request) for request in requests]

    def _basis(self, request: BroadcastBasis) -> Tensor:
        steps = request.maker()
        assert not isinstance(steps, Tensor)
        with full_precision(request.like.device.type):
            return drive(steps, self._answer).to(request.like.dtype)

    def _answer(self, request: AllReduce | AllGather | Eigh) -> Any:
        if isinstance(request, Eigh):
            return self._eigh(request.gram)
        tensor = request.tensor
        if isinstance(request, AllGather):
            return self._ranks.gather(tensor.reshape(-1)).view(self._ranks.size, *tensor.shape)
        if not request.partial:
            return tensor
        flat = tensor.clone(memory_format=torch.contiguous_format).view(-1)
        return self._ranks.sum(flat).view(tensor.shape)

    def _eigh(self, gram: Tensor) -> tuple[Tensor, Tensor]:
        """Solve a share of the matrices on each rank, and send all the same bits."""
        b, k = gram.shape[:2]
        shares = _dealt(b, self._ranks.size, 0)
        lo, hi = shares[self._ranks.rank]
        longest = max(end - start for start, end in shares)
        flat = gram.new_zeros(longest, k * (k + 1))
        if hi > lo and gram.device.type != "meta":
            values, vectors, _ = robust_eigh(gram[lo:hi])
            flat[: hi - lo] = torch.cat([values, vectors.flatten(1)], 1)
        everything = self._ranks.gather(flat.view(-1))
        if self._replicas is not None:
            everything = self._replicas.broadcast(everything.view(-1)).view(self._ranks.size, -1)
        rows = everything.view(self._ranks.size, longest, -1)
        solutions = torch.cat([rows[q, : end - start] for q, (start, end) in enumerate(shares)])
        return solutions[:, :k], solutions[:, k:].reshape(b, k, k)

    def agree(self, present: Tensor) -> Tensor:
        """Reduce flags by an element-wise or over the ranks."""
        return self._ranks.any(present)


def _dealt(count: int, ranks: int, start: int) -> list[tuple[int, int]]:
    """Return contiguous shares of `count` matrices that differ by at most one; the longer ones begin at `start`."""
    small, extra = divmod(count, ranks)
    shares, lo = [], 0
    for rank in range(ranks):
        size = small + ((rank - start) % ranks < extra)
        shares.append((lo, lo + size))
        lo += size
    return shares


def _length(shares: Sequence[tuple[int, int]], rank: int) -> int:
    return shares[rank][1] - shares[rank][0]


def _packed(batches: Sequence[Tensor], shares: Sequence[Sequence[tuple[int, int]]]) -> Tensor:
    """Return (W, longest): row q holds rank q's share of every batch, padded."""
    rows = [
        torch.cat([batch[lo:hi].reshape(-1) for batch, (lo, hi) in zip(batches, parts)])
        for parts in zip(*shares)
    ]
    longest = max(row.numel() for row in rows)
    return torch.stack([torch.nn.functional.pad(row, (0, longest - row.numel())) for row in rows])


def _unpacked(
    rows: Tensor, shares: Sequence[Sequence[tuple[int, int]]], widths: Sequence[int]
) -> list[Tensor]:
    """Invert `_packed` for batches of (b, width)."""
    parts: list[list[Tensor]] = [[] for _ in shares]
    for rank in range(rows.shape[0]):
        offset = 0
        for i, (share, width) in enumerate(zip(shares, widths)):
            size = _length(share, rank) * width
            parts[i].append(rows[rank, offset : offset + size].view(-1, width))
            offset += size
    return [torch.cat(rows_of_ranks) for rows_of_ranks in parts]


def _packed_root(root: InverseRoot) -> Tensor:
    """Return (b, r² + r + 2): root, singular values (zeros where there are none), rank, fallbacks."""
    values = root.singular_values
    if values is None:
        values = torch.zeros_like(root.root[..., 0])
    # Which matrix fell back is not known, how many of the batch is: the first one carries the number.
    fallbacks = torch.zeros_like(values[:, :1])
    fallbacks[:1, 0] = root.fallbacks
    return torch.cat(
        [root.root.flatten(1), values, root.effective_rank[:, None].to(values.dtype), fallbacks], 1
    )


def _unpacked_root(rows: Tensor, r: int, has_values: bool) -> InverseRoot:
    root, values, rank, fallbacks = rows.split([r * r, r, 1, 1], 1)
    return InverseRoot(
        root.reshape(-1, r, r), values if has_values else None, rank[:, 0].long(), fallbacks.sum().long()
    )


class ShardedLayout:
    """DTensors on one mesh, each `Shard(0)` or `Shard(1)` on one of its dimensions and replicated on the others.

    Args:
        parameters: (name, parameter), all of them DTensors.

    Raises:
        TypeError: placements that are not those of `fully_shard`; says which parameter.
    """

    def __init__(self, parameters: Sequence[tuple[str, Tensor]]) -> None:
        name, first = parameters[0]
        assert isinstance(first, DTensor)
        mesh = first.device_mesh
        dim = _shard_dim(name, first)
        self._dim, self._first = dim, (name, first)
        self.check(parameters)
        if mesh.ndim > 2:
            raise TypeError(f"{name}: a mesh of {mesh.ndim} dimensions is not supported (FSDP: 1, HSDP: 2)")
        self._ranks = Communicator(mesh.get_group(dim))
        self.replicas = Communicator(mesh.get_group(1 - dim)) if mesh.ndim == 2 else None
        self._shards = ShardCollectives(self._ranks, self.replicas)
        self.collectives: Collectives = self._shards

    @property
    def communicators(self) -> list[Communicator]:
        """Return the communicators within a replica and between replicas."""
        return [self._ranks] if self.replicas is None else [self._ranks, self.replicas]

    is_divided: bool = True

    @property
    def is_first_replica(self) -> bool:
        """Return True in the first replica."""
        return self.replicas is None or self.replicas.rank == 0

    def interval(self, parameter: Tensor) -> tuple[int | None, int]:
        """Return the axis and start of the rows or columns here."""
        axis = self._axis(parameter)
        return axis, self._interval(parameter, axis, self._ranks.rank)[0]

    def local_view(self, parameter: Tensor, block: Block) -> LocalView:
        """Return the view of its rows or columns here."""
        axis = self._axis(parameter)
        ranks = range(self._ranks.size)
        views = [shard_view_of(block, axis, self._interval(parameter, axis, rank)) for rank in ranks]
        return replace(
            views[self._ranks.rank], shard_bounds=tuple((h.start, h.shape[h.split or 0]) for h in views)
        )

    def _axis(self, parameter: Tensor) -> int:
        assert isinstance(parameter, DTensor)
        placement = parameter.placements[self._dim]
        assert isinstance(placement, Shard)
        return placement.dim

    def _interval(self, parameter: Tensor, axis: int, rank: int) -> tuple[int, int]:
        return chunk(parameter.shape[axis], self._ranks.size, rank)

    def buckets(self, matrices: Sequence[MatrixRef], rule: Rule, options: Mapping[str, Any]) -> list[Bucket]:
        """Return one bucket of rows, and one per bucket of matrices that go to owners.

        Matrices go to owners for a rule without a row form, or where that sends fewer bytes.
        """
        ranks = self._ranks.size
        fits = [traffic(rule, m.block.shape, m.view.split or 0, options, ranks)[1] for m in matrices]
        in_rows = [m for m, is_fit in zip(matrices, fits) if is_fit]
        buckets: list[Bucket] = []
        if in_rows:
            batch_states = make_batch_states(
                in_rows,
                options,
                lambda m: local_shapes(m, rule, options),
                agree=self._shards.agree,
                splits=lambda m: state_splits(m, rule, options),
            )
            buckets.append(LocalBucket(rule, batch_states, self._shards, together=True))
        return buckets + self._owner_buckets(
            [m for m, is_fit in zip(matrices, fits) if not is_fit], rule, options
        )

    def _owner_buckets(
        self, matrices: Sequence[MatrixRef], rule: Rule, options: Mapping[str, Any]
    ) -> list[Bucket]:
        owners = balanced_owners([work_of(m.block.shape) for m in matrices], self._ranks.size)
        sources = [self._sources(m) for m in matrices]
        return [
            OwnerBucket(
                [matrices[i] for i in positions],
                [sources[i] for i in positions],
                [owners[i] for i in positions],
                self._ranks,
                rule,
                options,
                # Bases are made in one replica and sent to the owners in the others.
                None if self.replicas is None else ReplicaCollectives(self.replicas),
            )
            for positions in bucket_positions(matrices, owners)
        ]

    def _sources(self, matrix: MatrixRef) -> list[tuple[int, int]]:
        axis = self._axis(matrix.parameter)
        intervals = []
        for rank in range(self._ranks.size):
            interval = self._interval(matrix.parameter, axis, rank)
            view = shard_view_of(matrix.block, axis, interval)
            assert view.split is not None
            other = matrix.block.shape[1 - view.split]
            intervals.append((view.start * other, (view.start + view.shape[view.split]) * other))
        return intervals

    def step_units(self, groups: Sequence[Mapping[str, Any]]) -> Iterable[StepUnit]:
        """Return one unit per group."""
        return whole_groups(groups)

    all_step_units = step_units

    def check(self, named: Sequence[tuple[str, Tensor]]) -> None:
        """Refuse all but DTensors on the same mesh, sharded along the same dimension of it."""
        first_name, first = self._first
        for name, parameter in named:
            if not isinstance(parameter, DTensor):
                raise TypeError(f"{name}: is not a DTensor, while other parameters are")
            if parameter.device_mesh != first.device_mesh or _shard_dim(name, parameter) != self._dim:
                raise TypeError(f"{name}: is sharded over another mesh than {first_name}")

    def agree(self, unit: StepUnit, flags: Tensor) -> Tensor:
        """Reduce flags by an element-wise or over the ranks of a replica."""
        return self._shards.agree(flags)

    def sum_parts(self, unit: StepUnit, values: Tensor) -> Tensor:
        """Sum over the ranks of a replica."""
        return self._ranks.sum(values)

    def is_writer(self, unit: StepUnit) -> bool:
        """Return True on the first rank of the first replica."""
        return self.is_first_replica and self._ranks.rank == 0

    def weight(self, parameter: Tensor) -> Tensor:
        """Return the local shard."""
        return local(parameter.detach())

    def gradient(self, parameter: Tensor) -> Tensor | None:
        """Return the local shard of the gradient."""
        return None if parameter.grad is None else local(parameter.grad)


def _shard_dim(name: str, parameter: DTensor) -> int:
    dims = [d for d, placement in enumerate(parameter.placements) if isinstance(placement, Shard)]
    others = [p for p in parameter.placements if not isinstance(p, (Shard, Replicate))]
    if len(dims) != 1 or others or parameter.placements[dims[0]].dim > 1:  # pyright: ignore[reportAttributeAccessIssue]
        raise TypeError(
            f"{name}: placements {tuple(parameter.placements)} are not supported; FSDP2 and HSDP shard each "
            "parameter along dimension 0 or 1 of one mesh dimension (tensor parallel layouts do not)"
        )
    return dims[0]


def is_sharded(parameters: Iterable[Tensor]) -> bool:
    """Return True if one of these is a DTensor."""
    return any(isinstance(p, DTensor) for p in parameters)
