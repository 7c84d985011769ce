"""Batches of same-shape matrices on this process: where their state lives, and in which dtype."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from optimizers.interfaces import MOVED_BASES, LocalView, MatrixBatch, MatrixRef, compute_dtype
from optimizers.skipping import StepMask
from optimizers.stored_moments import TensorPart, WideState, round_into, stored_dtype

# Bytes of gradient that one batch holds at most: the transient memory of a step is a small multiple of this.
# On CPUs larger blocks leave the cache and come fresh from the kernel each time; GPUs want few launches.
BATCH_BYTES = {"cpu": 1 << 24, "cuda": 1 << 29}

OptimizerState = Mapping[Tensor, dict[str, Any]]
Shapes = dict[str, tuple[int, ...]]


class BatchState:
    """Keep the state of a batch between steps: stacked tensors, of which `optimizer.state` holds the views.

    `optimizer.state` stays the truth: when its tensors have been replaced (load_state_dict, a device change)
    the stacked copy is rebuilt from them.

    Args:
        matrices: matrices of one shape, of which this process holds equal parts.
        options: of their group.
        shapes: kind → shape of one matrix' state here.
        splits: kind → dimension of which this process holds an interval, where there is one.
        agree: (b,) booleans "not zero here" → "not zero on any process that holds a part", a collective;
            None: this process holds all of what is looked at.
    """

    def __init__(
        self,
        matrices: Sequence[MatrixRef],
        options: Mapping[str, Any],
        shapes: Mapping[str, tuple[int, ...]],
        agree: Callable[[Tensor], Tensor] | None = None,
        splits: Mapping[str, int] = MappingProxyType({}),
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
        self._splits = splits
        self._dtypes = {kind: stored_dtype(kind, options, self.dtype) for kind in self.shapes}
        self._narrow = frozenset(kind for kind, dtype in self._dtypes.items() if dtype != self.dtype)
        self._stacked: dict[str, Tensor] = {}
        self._views: dict[str, list[Tensor]] = {}
        self._flags = [False] * len(self.matrices)
        self._incomplete = [False] * len(self.matrices)
        self._owed: dict[int, bool] = {}
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
            dtype = self.weight_dtype if kind == "compensation" else self._dtypes[kind]
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
        self._read_flags()
        # A basis that is moved on never regains a direction: one that lacks some is found anew in steps that are
        # powers of two, so that gradients that stay of low rank cost few SVDs.
        flags = [
            self._flags[i] or (self._incomplete[i] and t.bit_count() == 1) for i, t in zip(active, steps)
        ]
        due = [
            position
            for position, (i, t) in enumerate(zip(active, steps))
            if "refresh_interval" in self.options
            and (flags[position] or i in self._owed or self._scheduled(i, t))
        ]
        has_none = [flag or t == 0 or self._owed.get(i, False) for i, t, flag in zip(active, steps, flags)]
        # A matrix that skips the step in which its subspace was due gets it in the next one.
        for i in active:
            self._owed.pop(i, None)
        self._owed |= {active[position]: has_none[position] for position in due if position in skipped}
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
            radii=self._radii(matrices, state),
            dtype=self.dtype,
            split=self.split,
            start=self.start,
            shard_bounds=self.matrices[0].view.shard_bounds,
            fresh=frozenset(position for position in due if has_none[position]),
        )

    def _radii(self, matrices: Sequence[MatrixRef], state: Mapping[Tensor, dict[str, Any]]) -> Tensor | None:
        if self.options.get("weight_norm") != "hyperball":
            return None
        return torch.stack([state[m.parameter][m.key("weight_norm")] for m in matrices])

    def _scheduled(self, index: int, step: int) -> bool:
        return step == 0 or (step + self.matrices[index].offset) % self.options["refresh_interval"] == 0

    def watch(self, all_of: bool) -> None:
        """Ask the device which matrices want a new basis in the next step; the answer is read then.

        A basis is empty where the gradient was exactly zero when it was taken (zero-initialized layers in the
        first step), and incomplete where its rank was lower; it is looked at after each refresh (`all_of`).
        The residual criterion ‖Ĝ‖ ≤ ς is looked at each step. By the time of the next step the copy to the
        host has long arrived, so the host does not wait.
        """
        threshold = self.options.get("refresh_threshold")
        if "refresh_interval" not in self.options or not (
            all_of or threshold is not None or any(self._flags)
        ):
            return
        if "columns" in self._stacked:
            present = (self._stacked["columns"] >= 0).any(-1)
        else:
            bases = [stacked for kind, stacked in self._stacked.items() if kind.endswith("basis")]
            if not bases:
                return
            present = (bases[0][..., 0] != 0).any(-1)
            if self.options.get("basis") in MOVED_BASES:
                # Columns are in order of descending σ, and zero ones stay zero: the last one tells.
                present = torch.stack([present, (bases[0][..., -1] != 0).any(-1)])
        if self._agree is not None:
            present = self._agree(present.flatten()).view_as(present)
        flags = ~present
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

    def _read_flags(self) -> None:
        if self._posted is not None:
            host, event = self._posted
            if event is not None:
                event.synchronize()
            self._posted = None
            if host.ndim == 2:
                self._flags, self._incomplete = host.tolist()
            else:
                self._flags = host.tolist()

    def state_of(self, active: Sequence[int]) -> dict[str, Tensor]:
        """Return kind → stacked state of the active matrices: the tensors themselves if all are, else copies.

        Moments that are stored in another dtype are copied to the batch's when they are first read.
        """
        if len(active) == len(self.matrices):
            state = self._stacked
        else:
            state = {kind: torch.stack([views[i] for i in active]) for kind, views in self._views.items()}
        return WideState(state, self._narrow, self.dtype) if self._narrow else state

    def write_back(self, active: Sequence[int], batch: MatrixBatch) -> None:
        """Write back the copies of `state_of`; moments that are stored in another dtype are rounded."""
        is_all = len(active) == len(self.matrices)
        for kind, stacked in batch.state.items():
            if kind in self._narrow:
                targets = [self._views[kind][i] for i in active]
                self._round(kind, stacked, self._stacked[kind] if is_all else targets, batch)
            elif not is_all:
                torch._foreach_copy_([self._views[kind][i] for i in active], list(stacked.unbind(0)))  # pyright: ignore[reportPrivateImportUsage]

    def _round(self, kind: str, value: Tensor, target: Tensor | list[Tensor], batch: MatrixBatch) -> None:
        dim = self._splits.get(kind)
        local = self.shapes[kind]
        whole = list(local)
        if dim is not None:
            assert self.split is not None
            whole[dim] = self.matrices[0].block.shape[self.split]
        part = TensorPart(tuple(whole), dim, self.start if dim is not None else 0, local)
        round_into(target, value, part, batch.names, batch.steps, kind, self.options["seed"])


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
        self.home.write_back(self.active, self.batch)
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
    splits: Callable[[MatrixRef], Mapping[str, int]] = lambda matrix: {},
) -> list[BatchState]:
    """Group matrices that are alike and alike held here, at most `BATCH_BYTES` of gradients in each group.

    Args:
        matrices: in any mixture.
        options: of their group.
        shapes: kind → shape of the state of one matrix.
        agree: see `BatchState`.
        splits: of the state of one matrix, see `BatchState`.
    """
    kinds: dict[tuple[Any, ...], list[MatrixRef]] = {}
    for matrix in matrices:
        p, block, view = matrix.parameter, matrix.block, matrix.view
        key = (block.shape, block.transposed, p.dtype, p.device, view.split, view.shard_bounds)
        kinds.setdefault(key, []).append(matrix)
    batch_states = []
    for same in kinds.values():
        size = matrices_per_batch(same[0], _largest_shape(same[0].view))
        batch_states += [
            BatchState(same[i : i + size], options, shapes(same[0]), agree, splits(same[0]))
            for i in range(0, len(same), size)
        ]
    return batch_states


def _largest_shape(view: LocalView) -> tuple[int, int]:
    """Return the shape of the largest part that any process holds.

    Each batch has its collectives, so that all processes must make the same batches, also those that hold less.
    """
    if view.split is None or view.shard_bounds is None:
        return view.shape
    longest = max(length for _, length in view.shard_bounds)
    return (longest, view.shape[1]) if view.split == 0 else (view.shape[0], longest)


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
