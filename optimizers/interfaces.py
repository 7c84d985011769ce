"""What rules and layouts share: batches of same-shape matrices, updates, and the requests that cross ranks.

A rule (`Rule.update`) is straight-line code over one `MatrixBatch`. Where it needs a number from other ranks it yields
a request; the layout sends the answer (`layouts.layout.run_updates`).
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from optimizers.fused_projections import Block
from optimizers.linalg.inverse_root import InverseRoot, RootSolver
from optimizers.linalg.polar import Polar
from optimizers.linalg.requests import AllGather, AllReduce, Eigh
from optimizers.rule import Rule as Rule

ShardBounds = tuple[tuple[int, int], ...]
"""(start, length) of the interval of each rank along the axis that is split."""

MOVED_BASES = ("tracked", "power")
"""Values of `basis` for which a basis is moved on from the last one."""

T = TypeVar("T")


class LocalView(Protocol):
    """How this process holds a matrix (a block of a parameter): whole, or an interval of its rows or columns.

    Attributes:
        split: axis of which this process holds an interval (0 rows, 1 columns); None: it holds the matrix whole.
        start: where the interval begins.
        shape: (rows, columns) here; equal to the block's shape where nothing is split.
        shard_bounds: where the matrix is split: (start, length) of the interval of each rank. None: it is not.
    """

    @property
    def split(self) -> int | None: ...

    @property
    def start(self) -> int: ...

    @property
    def shape(self) -> tuple[int, int]: ...

    @property
    def shard_bounds(self) -> ShardBounds | None: ...

    def gradient(self, parameter: Tensor, block: Block) -> Tensor | None:
        """Return the gradient here, of `shape`; None where there is none."""
        ...

    def weight(self, parameter: Tensor, block: Block) -> Tensor:
        """Return the weights here as a view: `shape`, or 3-D where a fused projection is interleaved."""
        ...

    def elements(self, parameter: Tensor, block: Block) -> Tensor | None:
        """Return the gradient's elements that this process holds, in any shape; None where there is none."""
        ...

    def held(self, parameter: Tensor, block: Block) -> Tensor:
        """Return a view of all weights of the matrix that this process holds, in any shape, broken rows included."""
        ...

    def part(self, local: Tensor, block: Block) -> Tensor | None:
        """Return the matrix' interval of a tensor laid out as the parameter is here; None where it breaks rows."""
        ...


@dataclass(frozen=True)
class MatrixRef:
    """One matrix of a batch: a block of a parameter, and how this process holds it.

    Attributes:
        prefix: of its keys in the parameter's state: "" or "q.".
        offset: added to t when a refresh is decided.
    """

    parameter: Tensor
    block: Block
    prefix: str
    offset: int
    view: LocalView

    @property
    def unit(self) -> tuple[int, str]:
        """Return the key of this matrix in a `StepMask`."""
        return id(self.parameter), self.prefix

    @property
    def is_stepped(self) -> bool:
        """Return True where there is a gradient."""
        return self.gradient() is not None

    def key(self, kind: str) -> str:
        """Return the name of a state tensor in the parameter's state."""
        return self.prefix + kind

    def gradient(self) -> Tensor | None:
        """Return the gradient, (rows, columns) here; None where there is none."""
        return self.view.gradient(self.parameter, self.block)

    def weight(self) -> Tensor:
        """Return a view of the weights here."""
        return self.view.weight(self.parameter, self.block)


def compute_dtype(parameter: Tensor) -> torch.dtype:
    """Return the dtype of moments, bases, spectra and updates: fp64 for fp64 weights, else fp32."""
    return torch.float64 if parameter.dtype == torch.float64 else torch.float32


def parameter_shape(parameter: Tensor) -> torch.Size:
    """Return the whole shape, also where ZeRO-3 has emptied the parameter."""
    return getattr(parameter, "ds_shape", parameter.shape)


@dataclass
class MatrixBatch:
    """b matrices of one shape, as a rule sees them in one step.

    Attributes:
        matrices: the b matrices.
        shape: (m, n), full shape of each.
        fans: (out, in) of each.
        options: of the group.
        steps: t of each matrix, before this step.
        count: t + 1 as a tensor, so that a compiled rule has no number of the step baked in: 0-dim on the CPU
            where all agree (they do unless gradients were missing), else (b, 1, 1) on the device.
        due: positions whose subspace has to be renewed in this step.
        state: kind → (b, …), fp32 (fp64 for fp64 weights). Change it by `commit` and `blend` only.
        masked: bool on the device: this step must leave no trace, 0-dim for all matrices, (b,) for each. None: the
            host knows which these are.
        dtype: of state and arithmetic.
        split: axis of the matrices of which this process holds an interval only (0 rows, 1 columns); None: it
            holds them whole. `shape` is that of the whole matrix all the same.
        start: where the interval begins.
        shard_bounds: (start, length) of the intervals of all ranks, where the matrices are split.
        skipped: positions of which this step must leave no trace, as the host knows them.
        radii: (b,) fp64 Frobenius norms that the updates are given (`weight_norm=hyperball`); None: another size.
        keep_gradient: keep the stacked copy of the gradients between reads; False where many batches are alive.
        fresh: positions in `due` that have no basis to go on from: of the first step, or asked for by the device.
    """

    matrices: Sequence[MatrixRef]
    shape: tuple[int, int]
    fans: tuple[int, int]
    options: Mapping[str, Any]
    steps: list[int]
    count: Tensor
    due: list[int]
    state: dict[str, Tensor]
    masked: Tensor | None
    dtype: torch.dtype
    split: int | None = None
    start: int = 0
    shard_bounds: ShardBounds | None = None
    skipped: frozenset[int] = frozenset()
    radii: Tensor | None = None
    keep_gradient: bool = True
    fresh: frozenset[int] = frozenset()
    _gradient: Tensor | None = None
    _feedback: str | None = None

    @property
    def names(self) -> list[str]:
        """Return the names of the matrices."""
        return [matrix.block.name for matrix in self.matrices]

    @property
    def gradient(self) -> Tensor:
        """Return a (b, m, n) copy of the gradients (this process' interval) in `dtype`; the rule may overwrite it."""
        if self._gradient is not None:
            return self._gradient
        gradient = torch.stack([gradient_of(m) for m in self.matrices]).to(self.dtype)
        # Zeros for a matrix that skips the step: what is computed of it is not used, and must not disturb others.
        for position in self.skipped:
            gradient[position].zero_()
        if self.masked is not None and self.masked.ndim:
            gradient = torch.where(self.masked[:, None, None], 0.0, gradient)
        if self._feedback is not None:
            gradient += self.state[self._feedback]
        if self.keep_gradient:
            self._gradient = gradient
        return gradient

    def project(self, basis: Tensor, left: bool) -> Tensor:
        """Return QᵀG (b, r, n) with `left`, else GQ (b, m, r).

        Args:
            basis: Q, (b, m, r) with `left`, else (b, n, r).
        """
        if self._gradient is not None or not self._reads_one_by_one:
            return basis.mT @ self.gradient if left else self.gradient @ basis
        # On a CPU matrix by matrix, which saves the copy of the gradients.
        gradients = [gradient_of(m).to(self.dtype) for m in self.matrices]
        m, n = gradients[0].shape
        r = basis.shape[-1]
        out = basis.new_empty((len(gradients), r, n) if left else (len(gradients), m, r))
        for slot, q, gradient in zip(out, basis, gradients):
            torch.mm(q.mT, gradient, out=slot) if left else torch.mm(gradient, q, out=slot)
        for position in self.skipped:
            out[position].zero_()
        return out

    def squares(self, dim: int | tuple[int, int], dtype: torch.dtype) -> Tensor:
        """Return sums in `dtype` of squared gradients along -2, -1 or both: (b, 1, n), (b, m, 1) or (b, 1, 1)."""
        if self._gradient is not None or not self._reads_one_by_one:
            return self.gradient.square().sum(dim, keepdim=True, dtype=dtype)
        sums = [
            gradient_of(m).to(self.dtype).square().sum(dim, keepdim=True, dtype=dtype) for m in self.matrices
        ]
        for position in self.skipped:
            sums[position].zero_()
        return torch.stack(sums)

    @property
    def _reads_one_by_one(self) -> bool:
        """Return True where gradients are read matrix by matrix, which saves the copy of them on a CPU."""
        is_plain = self._feedback is None and self.masked is None
        return is_plain and self.matrices[0].parameter.device.type == "cpu"

    def feed_back(self, kind: str) -> None:
        """Add a state to the gradients from here on: what earlier steps left out."""
        self._feedback, self._gradient = kind, None

    def steps_before(self, at: slice) -> Tensor:
        """Return t of the matrices `at` as a tensor, like `count`."""
        return (self.count if self.count.ndim == 0 else self.count[at]) - 1.0

    def commit(self, kind: str, value: Tensor, at: slice | None = None) -> None:
        """Replace a state (of the matrices `at`), unless the step is masked."""
        target = self.state[kind] if at is None else self.state[kind][at]
        if self.masked is not None:
            value = torch.where(self._mask_for(target, at), target, value)
        elif self.skipped:
            first = 0 if at is None else at.start
            value = value.expand_as(target).clone()
            for position in self.skipped:
                if first <= position < first + len(target):
                    value[position - first] = target[position - first]
        target.copy_(value)

    def blend(self, kind: str, value: Tensor, decay: float, weight: float) -> Tensor:
        """Set state ← decay·state + weight·value, unless masked; return the state as it then is (or would be)."""
        old = self.state[kind]
        is_average = weight == 1.0 - decay
        if self.masked is None:
            kept = {position: old[position].clone() for position in self.skipped}
            new = old.lerp_(value, weight) if is_average else old.mul_(decay).add_(value, alpha=weight)
            for position, before in kept.items():
                old[position] = before
            return new
        new = torch.lerp(old, value, weight) if is_average else torch.add(decay * old, value, alpha=weight)
        torch.where(self._mask_for(old), old, new, out=old)
        return new

    def _mask_for(self, state: Tensor, at: slice | None = None) -> Tensor:
        """Return `masked` in a shape that broadcasts over a state of these matrices."""
        assert self.masked is not None
        if self.masked.ndim == 0:
            return self.masked
        part = self.masked if at is None else self.masked[at]
        return part.view(-1, *[1] * (state.ndim - 1))

    def release(self) -> None:
        """Drop the copy of the gradients."""
        self._gradient = None

    def due_slices(self) -> Iterator[slice]:
        """Yield the positions in `due` as contiguous slices."""
        return contiguous(self.due)


def contiguous(positions: Sequence[int]) -> Iterator[slice]:
    """Yield ascending positions as contiguous slices: slicing needs no index tensor on the device."""
    start = 0
    for place, position in enumerate(positions):
        if place + 1 == len(positions) or positions[place + 1] != position + 1:
            yield slice(positions[start], position + 1)
            start = place + 1


def gradient_of(matrix: MatrixRef) -> Tensor:
    """Return the gradient of a matrix that has one."""
    gradient = matrix.gradient()
    assert gradient is not None
    return gradient


@dataclass(frozen=True)
class LowRank:
    """An update that is not formed yet: keep·G + left·right.

    Attributes:
        left: (b, m, r).
        right: (b, r, n).
        keep: factor on the gradient: a number, or (b, 1, n), (b, m, 1) or (b, 1, 1) for each column, row or matrix.
    """

    left: Tensor
    right: Tensor
    keep: float | Tensor = 0.0

    def dense(self, batch: MatrixBatch) -> Tensor:
        """Return (b, m, n), written over the batch's gradient where that is part of it."""
        if isinstance(self.keep, Tensor):
            return batch.gradient.mul_(self.keep).baddbmm_(self.left, self.right)
        if self.keep == 0.0:
            return torch.bmm(self.left, self.right)
        return batch.gradient.baddbmm_(self.left, self.right, beta=self.keep)


class Update(NamedTuple):
    """What a rule returns for a batch; the optimizer then does W ← (1 - lr·wd)·W - lr·delta.

    Attributes:
        delta: (b, m, n) in the batch's dtype; or `LowRank`, which some layouts can send or apply without
            forming it. The optimizer may overwrite it.
        moment: (b, …) what was orthogonalized or normalized; None: the state that `Rule.observed` names.
        factor: (b, …) the orthogonal factor that was applied to it; None: the rule applies none.
        singular_values: (b, k) of `moment`, descending, where the step computed them.
        fallbacks: 0-dim int64 on the device: matrices whose factorization needed a fallback.
    """

    delta: Tensor | LowRank
    moment: Tensor | None = None
    factor: Tensor | None = None
    singular_values: Tensor | None = None
    fallbacks: Tensor | None = None


class SolveRoot(NamedTuple):
    """Request (MᵀM)^(-1/2) of (b, r, r) fp64 Grams; answered by an `InverseRoot`.

    Attributes:
        gram: this rank's summand of the Grams with `partial`, else the complete ones.
        solver: method and its settings.
    """

    gram: Tensor
    solver: RootSolver
    partial: bool


class BroadcastBasis(NamedTuple):
    """Request a new subspace basis; answered by a tensor of shape, dtype and device of `like`.

    A basis comes from eigen- or singular vectors, of which a last-bit difference between machines can make another
    basis: one process makes it, all use the same bits.

    Attributes:
        maker: computes the basis; for a split matrix it returns a generator of `linalg.requests`.
        work: cost of `maker` relative to the other requests; replicas divide the requests by it.
    """

    maker: Callable[[], Tensor | Generator[AllReduce | AllGather | Eigh, Any, Tensor]]
    like: Tensor
    work: float = 1.0


@dataclass(frozen=True)
class GatherPolar:
    """Request the polar factor of moments of which this process holds an interval; answered by that interval of it.

    Attributes:
        moment: (b, m_local, n) for dim -2, (b, m, n_local) for dim -1.
        shape: (m, n) of a whole one.
        dim: that is split.
        shard_bounds: (start, length) of every rank along it.
        solve: whole moments (b', m, n) → their factors.
    """

    moment: Tensor
    shape: tuple[int, int]
    dim: int
    shard_bounds: ShardBounds
    solve: Callable[[Tensor], Polar]

    def split_first(self, matrices: Tensor) -> Tensor:
        """Transpose between the moments' own orientation and the one in which the split dimension leads."""
        return matrices if self.dim == -2 else matrices.mT

    def unflatten(self, flat: Tensor) -> Tensor:
        """Return (b', m, n) of (b', m·n) as they travel."""
        m, n = self.shape
        return flat.view(-1, m, n) if self.dim == -2 else flat.view(-1, n, m).mT


class InTurn(NamedTuple):
    """Request to go on alone: the layout runs this batch to its end before any other, to hold one dense update."""


Request = AllReduce | SolveRoot | BroadcastBasis | GatherPolar | InTurn
Steps = Generator[Request | list[Request], Any, T]
"""Part of a rule that yields a request, or a list of them in one phase, and is sent the answer(s)."""


class Collectives(Protocol):
    """The collectives that answer requests, each for all batches of a phase at once.

    All processes issue the same calls in the same order.

    Attributes:
        exchanges_bases: `broadcast_bases` communicates, so all batches of a step should share one call.
    """

    exchanges_bases: bool

    def all_reduce(self, tensors: Sequence[Tensor], partial: Sequence[bool] | None = None) -> list[Tensor]:
        """Sum each tensor over the processes that hold parts of its matrices; where not `partial`, return it."""
        ...

    def inverse_roots(self, requests: Sequence[SolveRoot]) -> list[InverseRoot]:
        """Return the inverse roots of the complete Grams."""
        ...

    def polar_factors(self, requests: Sequence[GatherPolar]) -> list[Polar]:
        """Return this process' interval of the factor of each moment."""
        ...

    def broadcast_bases(self, requests: Sequence[BroadcastBasis]) -> list[Tensor]:
        """Return new bases, with the same bits on all processes."""
        ...
