"""Batches of same-shape matrices on this process: where their state lives, and how updates are applied."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from optimizers.interfaces import LowRank, MatrixBatch, MatrixRef, compute_dtype, gradient_of
from optimizers.rounding import Rounding, compensated, rounded
from optimizers.skipping import StepMask

# Bytes of gradient that one batch holds at most: the transient memory of a step is a small multiple of this.
# On CPUs larger blocks leave the cache and come fresh from the kernel each time; GPUs want few launches.
BATCH_BYTES = {"cpu": 1 << 24, "cuda": 1 << 29}

OptimizerState = Mapping[Tensor, dict[str, Any]]
Shapes = dict[str, tuple[int, ...]]
_T = TypeVar("_T")


class BatchState:
    """Keep the state of a batch between steps: stacked tensors, of which `optimizer.state` holds the views.

    `optimizer.state` stays the truth: when its tensors have been replaced (load_state_dict, a device change)
    the stacked copy is rebuilt from them.

    Args:
        matrices: matrices of one shape, of which this process holds equal parts.
        options: of their group.
        shapes: kind → shape of one matrix' state here.
        agree: (b,) booleans "not zero here" → "not zero on any process that holds a part", a collective;
            None: this process holds all of what is looked at.
    """

    def __init__(
        self,
        matrices: Sequence[MatrixRef],
        options: Mapping[str, Any],
        shapes: Mapping[str, tuple[int, ...]],
        agree: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.matrices = list(matrices)
        self.options = options
        self.shapes = dict(shapes)
        self._agree = agree
        first = self.matrices[0]
        self.split, self.start = first.view.split, first.view.start
        self.shape, self.fans = first.block.shape, first.block.fans
        self.dtype = compute_dtype(first.parameter)
        self.device = first.parameter.device
        self.weight_dtype = first.parameter.dtype
        self._stacked: dict[str, Tensor] = {}
        self._views: dict[str, list[Tensor]] = {}
        self._flags = [False] * len(self.matrices)
        self._owed: set[int] = set()
        self._posted: tuple[Tensor, torch.Event | None] | None = None

    def fits(self) -> bool:
        """Return True if the parameters still have the device and dtype for which this was built."""
        return all(
            m.parameter.device == self.device and m.parameter.dtype == self.weight_dtype
            for m in self.matrices
        )

    def bind(self, state: Mapping[Tensor, dict[str, Any]]) -> None:
        """Make `state` hold views of the stacked tensors, taking over what it holds now (zeros where
        nothing)."""
        for kind, shape in self.shapes.items():
            views = self._views.get(kind)
            if views is not None and all(
                state[m.parameter].get(m.key(kind)) is view for m, view in zip(self.matrices, views)
            ):
                continue
            dtype = self.weight_dtype if kind == "compensation" else self.dtype
            stacked = torch.zeros((len(self.matrices), *shape), dtype=dtype, device=self.device)
            for slot, matrix in zip(stacked, self.matrices):
                existing = state[matrix.parameter].get(matrix.key(kind))
                if existing is not None:
                    slot.copy_(existing)
            self._stacked[kind] = stacked
            self._views[kind] = list(stacked.unbind(0))
            for matrix, view in zip(self.matrices, self._views[kind]):
                state[matrix.parameter][matrix.key(kind)] = view

    def stacked(self, kind: str) -> Tensor:
        """Return the (b, …) state of all matrices; `bind` first."""
        return self._stacked[kind]

    def batch(
        self, active: Sequence[int], state: Mapping[Tensor, dict[str, Any]], mask: StepMask
    ) -> MatrixBatch:
        """Return the matrices that have a gradient as the batch of one step."""
        matrices = [self.matrices[i] for i in active]
        units = [m.unit for m in matrices]
        skipped = mask.positions(units)
        steps = [state[m.parameter]["step"] for m in matrices]
        flags = self._read_flags()
        due = [
            position
            for position, (i, t) in enumerate(zip(active, steps))
            if "refresh_interval" in self.options and (flags[i] or i in self._owed or self._scheduled(i, t))
        ]
        # A matrix that skips the step in which its subspace was due gets it in the next one.
        self._owed -= set(active)
        self._owed |= {active[position] for position in due if position in skipped}
        due = [position for position in due if position not in skipped]
        return MatrixBatch(
            matrices=matrices,
            shape=self.shape,
            fans=self.fans,
            options=self.options,
            steps=steps,
            count=_count(steps, self.device),
            due=due,
            state=self.state_of(active),
            masked=mask.tensor(units, self.device),
            skipped=skipped,
            dtype=self.dtype,
            split=self.split,
            start=self.start,
            shard_bounds=self.matrices[0].view.shard_bounds,
        )

    def _scheduled(self, index: int, step: int) -> bool:
        return step == 0 or (step + self.matrices[index].offset) % self.options["refresh_interval"] == 0

    def watch(self, all_of: bool) -> None:
        """Ask the device which matrices want a new basis in the next step; the answer is read then.

        A basis is empty where the gradient was exactly zero when it was taken (zero-initialized layers in the
        first step); it is looked at after each refresh (`all_of`). The residual criterion ‖Ĝ‖ ≤ ς is looked
        at each step. By the time of the next step the copy to the host has long arrived, so the host does not
        wait.
        """
        threshold = self.options.get("refresh_threshold")
        if "refresh_interval" not in self.options or not (
            all_of or threshold is not None or any(self._flags)
        ):
            return
        present = (self._stacked["basis"][..., 0] != 0).any(-1)
        flags = ~(present if self._agree is None else self._agree(present))
        if threshold is not None:
            flags = flags | (self._stacked["projected_norm"] <= threshold)
        if flags.device.type == "meta":
            return
        if flags.device.type == "cpu":
            self._posted = flags, None
            return
        host = torch.empty(flags.shape, dtype=torch.bool, pin_memory=True)
        host.copy_(flags, non_blocking=True)
        event = torch.Event(flags.device)
        event.record()
        self._posted = host, event

    def _read_flags(self) -> list[bool]:
        if self._posted is not None:
            host, event = self._posted
            if event is not None:
                event.synchronize()
            self._flags, self._posted = host.tolist(), None
        return self._flags

    def state_of(self, active: Sequence[int]) -> dict[str, Tensor]:
        """Return kind → stacked state of the active matrices: the tensors themselves if all are, else copies."""
        if len(active) == len(self.matrices):
            return self._stacked
        return {kind: torch.stack([views[i] for i in active]) for kind, views in self._views.items()}

    def write_back(self, active: Sequence[int], state: Mapping[str, Tensor]) -> None:
        """Write back the copies of `state_of`."""
        if len(active) == len(self.matrices):
            return
        for kind, stacked in state.items():
            torch._foreach_copy_([self._views[kind][i] for i in active], list(stacked.unbind(0)))  # pyright: ignore[reportPrivateImportUsage]


def _count(steps: list[int], device: torch.device) -> Tensor:
    if all(step == steps[0] for step in steps):
        return torch.tensor(steps[0] + 1.0, dtype=torch.float64)
    counts = torch.tensor([step + 1.0 for step in steps], dtype=torch.float64)
    return counts.to(device, non_blocking=True)[:, None, None]


class BatchEntry(NamedTuple):
    """The batch of one step.

    Attributes:
        home: where its state lives.
        active: positions in `home` of the matrices that have a gradient.
        batch: these matrices.
    """

    home: BatchState
    active: list[int]
    batch: MatrixBatch

    def finish(self) -> None:
        """Write the changed state back, ask which bases the next step renews, and drop the gradients."""
        self.home.write_back(self.active, self.batch.state)
        self.home.watch(all_of=bool(self.batch.due))
        self.batch.release()


def batch_entries(batch_state: BatchState, state: OptimizerState, mask: StepMask) -> list[BatchEntry]:
    """Return the batch of this step, as a list of one; an empty list where no matrix has a gradient."""
    active = [i for i, matrix in enumerate(batch_state.matrices) if matrix.is_stepped]
    if not active:
        return []
    batch_state.bind(state)
    return [BatchEntry(batch_state, active, batch_state.batch(active, state, mask))]


def make_batch_states(
    matrices: Sequence[MatrixRef],
    options: Mapping[str, Any],
    shapes: Callable[[MatrixRef], Shapes],
    agree: Callable[[Tensor], Tensor] | None = None,
) -> list[BatchState]:
    """Group matrices that are alike and alike held here, at most `BATCH_BYTES` of gradients in each group.

    Args:
        matrices: in any mixture.
        options: of their group.
        shapes: kind → shape of the state of one matrix.
        agree: see `BatchState`.
    """
    kinds: dict[tuple[Any, ...], list[MatrixRef]] = {}
    for matrix in matrices:
        p, block, view = matrix.parameter, matrix.block, matrix.view
        key = (block.shape, block.transposed, p.dtype, p.device, view.split, view.shard_bounds)
        kinds.setdefault(key, []).append(matrix)
    batch_states = []
    for same in kinds.values():
        size = matrices_per_batch(same[0], same[0].view.shape)
        batch_states += [
            BatchState(same[i : i + size], options, shapes(same[0]), agree) for i in range(0, len(same), size)
        ]
    return batch_states


def matrices_per_batch(matrix: MatrixRef, shape: tuple[int, int]) -> int:
    """Return how many matrices of this shape one batch holds."""
    matrix_bytes = shape[0] * shape[1] * compute_dtype(matrix.parameter).itemsize
    limit = BATCH_BYTES.get(matrix.parameter.device.type, BATCH_BYTES["cuda"])
    return max(1, limit // max(1, matrix_bytes))


def compensation(matrix: MatrixRef, options: Mapping[str, Any]) -> Shapes:
    """Return the shapes of the state that stays with the weights: the compensation of Kahan's sum."""
    if options["rounding"] != "kahan" or matrix.parameter.dtype == compute_dtype(matrix.parameter):
        return {}
    return {"compensation": matrix.view.shape}


@dataclass(frozen=True)
class ApplyConfig:
    """How an update Δ reaches the weights: W ← (1 - lr·wd)·W - lr·Δ.

    Attributes:
        lr: learning rate of this step; a 0-dim tensor is taken too.
        weight_decay: decoupled.
        decay_last: the decay multiplies the weight after the step instead of before.
        rounding: how half-precision weights take the fp32 result.
    """

    lr: float | Tensor
    weight_decay: float
    decay_last: bool
    rounding: Rounding


def apply_update(batch: MatrixBatch, delta: Tensor | LowRank, config: ApplyConfig) -> None:
    """Update the weights of a batch (this process' part of them); Δ may be overwritten.

    Args:
        batch: whose weights.
        delta: (b, m, n) in the batch's dtype, or its factors.
        config: learning rate, decay, rounding.
    """
    lr, weight_decay, decay_last = config.lr, config.weight_decay, config.decay_last
    weights = [m.weight() for m in batch.matrices]
    if isinstance(delta, LowRank):
        if _in_place(batch, weights):
            _apply_factors(batch, weights, delta, config)
            return
        delta = delta.dense(batch)
    mask = batch.masked
    if mask is not None and mask.ndim:
        mask = mask[:, None, None]
    if mask is not None:
        # Not a product: a masked step usually holds NaN, and NaN·0 is NaN.
        delta = torch.where(mask, 0.0, delta)
    decay: float | Tensor = 1.0 - lr * weight_decay
    if mask is not None and weight_decay:
        decay = torch.where(mask, torch.ones((), dtype=batch.dtype, device=delta.device), decay)
    if weights[0].dtype != batch.dtype:
        apply_to_half(batch, weights, delta, lr, decay if weight_decay else None, decay_last, config.rounding)
        return
    deltas = [m.block.like_view(d) for m, d in zip(batch.matrices, delta.unbind(0))]
    descend(stepped(batch, weights), stepped(batch, deltas), config, decay)


def stepped(batch: MatrixBatch, values: Sequence[_T]) -> list[_T]:
    """Return the values (one for each matrix) of the matrices that take the step, as far as the host knows."""
    return [value for position, value in enumerate(values) if position not in batch.skipped]


def descend(
    weights: list[Tensor], deltas: list[Tensor], config: ApplyConfig, decay: float | Tensor | None = None
) -> None:
    """Apply W ← decay·W - lr·Δ for tensors of any shape, of one dtype; Δ may be overwritten.

    Args:
        weights: to be changed.
        deltas: of their shapes.
        config: learning rate and order.
        decay: factor on the weights, or one for each along its first axis; None: what `config` says.
    """
    if not weights:
        return
    lr = config.lr
    if decay is None:
        decay = 1.0 - lr * config.weight_decay
    if config.weight_decay and not config.decay_last:
        _decay(weights, decay)
    if isinstance(lr, Tensor):
        torch._foreach_mul_(deltas, lr)  # pyright: ignore[reportPrivateImportUsage]
        lr = 1.0
    torch._foreach_add_(weights, deltas, alpha=-lr)  # pyright: ignore[reportPrivateImportUsage]
    if config.weight_decay and config.decay_last:
        _decay(weights, decay)


def _decay(weights: list[Tensor], decay: float | Tensor) -> None:
    if isinstance(decay, Tensor) and decay.ndim:
        for weight, factor in zip(weights, decay.reshape(-1).unbind(0)):
            weight.mul_(factor)
        return
    torch._foreach_mul_(weights, decay)  # pyright: ignore[reportPrivateImportUsage]


def _in_place(batch: MatrixBatch, weights: Sequence[Tensor]) -> bool:
    """Return True if factors are multiplied straight into the weights.

    On a CPU that saves two passes over memory; on a GPU it would cost a launch per matrix.
    """
    return (
        batch.masked is None
        and weights[0].device.type == "cpu"
        and weights[0].dtype == batch.dtype
        and weights[0].ndim == 2
    )


def _apply_factors(batch: MatrixBatch, weights: list[Tensor], delta: LowRank, config: ApplyConfig) -> None:
    lr = float(config.lr)
    decay = 1.0 - lr * config.weight_decay
    weights = stepped(batch, weights)
    if not weights:
        return
    if decay != 1.0 and not config.decay_last:
        torch._foreach_mul_(weights, decay)  # pyright: ignore[reportPrivateImportUsage]
    if delta.keep:
        gradients = [gradient_of(m).to(batch.dtype) for m in stepped(batch, batch.matrices)]
        torch._foreach_add_(weights, gradients, alpha=-lr * delta.keep)  # pyright: ignore[reportPrivateImportUsage]
    lefts, rights = stepped(batch, delta.left.unbind(0)), stepped(batch, delta.right.unbind(0))
    for weight, left, right in zip(weights, lefts, rights):
        weight.addmm_(left, right, alpha=-lr)
    if decay != 1.0 and config.decay_last:
        torch._foreach_mul_(weights, decay)  # pyright: ignore[reportPrivateImportUsage]


def apply_to_half(
    batch: MatrixBatch,
    weights: Sequence[Tensor],
    delta: Tensor,
    lr: float | Tensor,
    decay: float | Tensor | None,
    decay_last: bool,
    rounding: Rounding,
) -> None:
    """Update half-precision weights in fp32, from one fp32 copy of the batch, and round once."""
    blocks = [matrix.block for matrix in batch.matrices]
    shape = delta.shape[1:]
    old = torch.stack([weight.reshape(shape) for weight in weights])
    wide = old.to(delta.dtype)
    start = wide if decay is None or decay_last else wide * decay
    new = start - lr * delta
    if decay is not None and decay_last:
        new = new * decay
    if rounding.mode == "kahan":
        result, compensation = compensated(old, new - wide, batch.state["compensation"])
        batch.commit("compensation", compensation)
    else:
        # Shards of one matrix must not all round by the same bits.
        name = f"{batch.names[0]}@{batch.start}" if batch.start else batch.names[0]
        result = rounded(new, old.dtype, rounding, name, batch.steps[0])
    if batch.masked is not None:
        mask = batch.masked if batch.masked.ndim == 0 else batch.masked[:, None, None]
        result = torch.where(mask, old, result)
    pairs = [
        (weight, block.like_view(part))
        for i, (weight, block, part) in enumerate(zip(weights, blocks, result.unbind(0)))
        if i not in batch.skipped
    ]
    if pairs:
        torch._foreach_copy_([w for w, _ in pairs], [part for _, part in pairs])  # pyright: ignore[reportPrivateImportUsage]
