"""Same-shape matrices as one stack: what a rule sees, where its state lives, how its update reaches the
weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from optimizers.members import Member, compute_dtype
from optimizers.rounding import Rounding, apply_to_half
from optimizers.skipping import StepMask

# Bytes of gradient that one stack holds at most: the transient memory of a step is a small multiple of this.
# On CPUs larger blocks leave the cache and come fresh from the kernel each time; GPUs want few launches.
STACK_BYTES = {"cpu": 1 << 24, "cuda": 1 << 29}


_T = TypeVar("_T")
Axes = tuple[int | None, ...]
"""For each dimension of a state: the axis of the matrix that it runs along (0 rows, 1 columns), or None."""


@dataclass
class Stack:
    """b matrices of one shape, as a rule sees them in one step.

    Attributes:
        members: the matrices.
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
        skipped: positions of which this step must leave no trace, as the host knows them.
        dtype: of state and arithmetic.
        split: axis of the matrices of which this process holds an interval only (0 rows, 1 columns); None: it
            holds them whole. `shape` is that of the whole matrix all the same.
        start: where the interval begins.
        pattern: (start, length) of the intervals of all ranks.
    """

    members: Sequence[Member]
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
    pattern: Any = None
    skipped: frozenset[int] = frozenset()
    keep_gradient: bool = True
    _gradient: Tensor | None = None

    @property
    def names(self) -> list[str]:
        """Names of the matrices."""
        return [member.block.name for member in self.members]

    @property
    def gradient(self) -> Tensor:
        """(b, m, n) copy of the gradients (of what this process holds of them) in `dtype`; the rule may
        overwrite it when it needs it no more."""
        if self._gradient is not None:
            return self._gradient
        gradient = torch.stack([_gradient_of(m) for m in self.members]).to(self.dtype)
        # Zeros for a matrix that skips the step: what is computed of it is not used, and must not disturb others.
        for position in self.skipped:
            gradient[position].zero_()
        if self.masked is not None and self.masked.ndim:
            gradient = torch.where(self.masked[:, None, None], 0.0, gradient)
        if self.keep_gradient:
            self._gradient = gradient
        return gradient

    def projected(self, basis: Tensor, left: bool) -> Tensor:
        """QᵀG (b, r, n), or GQ (b, m, r); on a CPU matrix by matrix, which saves the copy of the gradients.

        Args:
            basis: Q, (b, m, r) for left, else (b, n, r).
        """
        if self._gradient is not None or self.masked is not None or basis.device.type != "cpu":
            return basis.mT @ self.gradient if left else self.gradient @ basis
        gradients = [_gradient_of(m).to(self.dtype) for m in self.members]
        m, n = gradients[0].shape
        r = basis.shape[-1]
        out = basis.new_empty((len(gradients), r, n) if left else (len(gradients), m, r))
        for slot, q, gradient in zip(out, basis, gradients):
            torch.mm(q.mT, gradient, out=slot) if left else torch.mm(gradient, q, out=slot)
        for position in self.skipped:
            out[position].zero_()
        return out

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

    def _mask_for(self, state: Tensor, at: slice | None = None) -> Tensor:
        """`masked`, in a shape that broadcasts over a state of these matrices."""
        assert self.masked is not None
        if self.masked.ndim == 0:
            return self.masked
        part = self.masked if at is None else self.masked[at]
        return part.view(-1, *[1] * (state.ndim - 1))

    def blend(self, kind: str, value: Tensor, decay: float, weight: float) -> Tensor:
        """state ← decay·state + weight·value, unless masked; returns the state as it then is (or would
        be)."""
        old = self.state[kind]
        average = weight == 1.0 - decay
        if self.masked is None:
            before = {position: old[position].clone() for position in self.skipped}
            new = old.lerp_(value, weight) if average else old.mul_(decay).add_(value, alpha=weight)
            for position, kept in before.items():
                old[position] = kept
            return new
        new = torch.lerp(old, value, weight) if average else torch.add(decay * old, value, alpha=weight)
        torch.where(self._mask_for(old), old, new, out=old)
        return new

    def release(self) -> None:
        """Let go of the gradients."""
        self._gradient = None

    def runs(self) -> Iterator[slice]:
        """The positions in `due` as contiguous slices: slicing needs no index tensor, so no copy to the
        device."""
        start = 0
        for position, index in enumerate(self.due):
            last = position + 1 == len(self.due)
            if last or self.due[position + 1] != index + 1:
                yield slice(self.due[start], index + 1)
                start = position + 1


@dataclass(frozen=True)
class LowRank:
    """An update that is not formed yet: keep·G + left·right.

    Attributes:
        left: (b, m, r).
        right: (b, r, n).
        keep: factor on the gradient.
    """

    left: Tensor
    right: Tensor
    keep: float = 0.0

    def dense(self, stack: Stack) -> Tensor:
        """(b, m, n), written over the stack's gradient where that is part of it."""
        if self.keep == 0.0:
            return torch.bmm(self.left, self.right)
        return stack.gradient.baddbmm_(self.left, self.right, beta=self.keep)


def _gradient_of(member: Member) -> Tensor:
    gradient = member.gradient()
    assert gradient is not None
    return gradient


class Bank:
    """The stack's home between steps: stacked state, of which `optimizer.state` holds the single matrices'
    views.

    `optimizer.state` stays the truth: when its tensors have been replaced (load_state_dict, a device change)
    the stacked copy is rebuilt from them.

    Args:
        members: matrices of one shape, of which this process holds equal parts.
        options: of their group.
        shapes: kind → shape of one matrix' state here.
        agree: (b,) booleans "not zero here" → "not zero on any process that holds a part", a collective;
            None: this process holds all of what is looked at.
    """

    def __init__(
        self,
        members: Sequence[Member],
        options: Mapping[str, Any],
        shapes: Mapping[str, tuple[int, ...]],
        agree: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.members = list(members)
        self.options = options
        self.shapes = dict(shapes)
        self._agree = agree
        first = self.members[0]
        self.split, self.start = first.holding.split, first.holding.start
        self.shape, self.fans = first.block.shape, first.block.fans
        self.dtype = compute_dtype(first.parameter)
        self.device = first.parameter.device
        self.weight_dtype = first.parameter.dtype
        self._stacked: dict[str, Tensor] = {}
        self._views: dict[str, list[Tensor]] = {}
        self._flags = [False] * len(self.members)
        self._owed: set[int] = set()
        self._posted: tuple[Tensor, torch.Event | None] | None = None

    def fits(self) -> bool:
        """Whether the parameters still are where and what they were when the bank was built."""
        return all(
            m.parameter.device == self.device and m.parameter.dtype == self.weight_dtype for m in self.members
        )

    def bind(self, state: Mapping[Tensor, dict[str, Any]]) -> None:
        """Make `state` hold views of the stacked tensors, taking over what it holds now (zeros where
        nothing)."""
        for kind, shape in self.shapes.items():
            views = self._views.get(kind)
            if views is not None and all(
                state[m.parameter].get(m.key(kind)) is view for m, view in zip(self.members, views)
            ):
                continue
            dtype = self.weight_dtype if kind == "compensation" else self.dtype
            stacked = torch.zeros((len(self.members), *shape), dtype=dtype, device=self.device)
            for slot, member in zip(stacked, self.members):
                held = state[member.parameter].get(member.key(kind))
                if held is not None:
                    slot.copy_(held)
            self._stacked[kind] = stacked
            self._views[kind] = list(stacked.unbind(0))
            for member, view in zip(self.members, self._views[kind]):
                state[member.parameter][member.key(kind)] = view

    def stacked(self, kind: str) -> Tensor:
        """(b, …) state of all members; `bind` first."""
        return self._stacked[kind]

    def stack(self, active: Sequence[int], state: Mapping[Tensor, dict[str, Any]], mask: StepMask) -> Stack:
        """The members that have a gradient, for one step."""
        members = [self.members[i] for i in active]
        units = [m.unit for m in members]
        skipped = mask.positions(units)
        steps = [state[m.parameter]["step"] for m in members]
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
        return Stack(
            members=members,
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
            pattern=self.members[0].holding.pattern,
        )

    def _scheduled(self, index: int, step: int) -> bool:
        return step == 0 or (step + self.members[index].offset) % self.options["refresh_interval"] == 0

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
        """kind → stacked state of the active matrices: the tensors themselves if all are, else copies."""
        if len(active) == len(self.members):
            return self._stacked
        return {kind: torch.stack([views[i] for i in active]) for kind, views in self._views.items()}

    def write_back(self, active: Sequence[int], state: Mapping[str, Tensor]) -> None:
        """Return the copies that `state_of` made."""
        if len(active) == len(self.members):
            return
        for kind, stacked in state.items():
            torch._foreach_copy_([self._views[kind][i] for i in active], list(stacked.unbind(0)))  # pyright: ignore[reportPrivateImportUsage]


def _count(steps: list[int], device: torch.device) -> Tensor:
    if all(step == steps[0] for step in steps):
        return torch.tensor(steps[0] + 1.0, dtype=torch.float64)
    counts = torch.tensor([step + 1.0 for step in steps], dtype=torch.float64)
    return counts.to(device, non_blocking=True)[:, None, None]


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


def apply_update(stack: Stack, delta: Tensor | LowRank, config: ApplyConfig) -> None:
    """Take one step of the stack's weights (of what this process holds of them); Δ may be overwritten.

    Args:
        stack: whose weights.
        delta: (b, m, n) in the stack's dtype, or its factors.
        config: learning rate, decay, rounding.
    """
    lr, weight_decay, decay_last = config.lr, config.weight_decay, config.decay_last
    weights = [m.weight() for m in stack.members]
    if isinstance(delta, LowRank):
        if _in_place(stack, weights):
            _apply_factors(stack, weights, delta, config)
            return
        delta = delta.dense(stack)
    mask = stack.masked
    if mask is not None and mask.ndim:
        mask = mask[:, None, None]
    if mask is not None:
        # Not a product: a masked step usually holds NaN, and NaN·0 is NaN.
        delta = torch.where(mask, 0.0, delta)
    decay: float | Tensor = 1.0 - lr * weight_decay
    if mask is not None and weight_decay:
        decay = torch.where(mask, torch.ones((), dtype=stack.dtype, device=delta.device), decay)
    if weights[0].dtype != stack.dtype:
        apply_to_half(stack, weights, delta, lr, decay if weight_decay else None, decay_last, config.rounding)
        return
    deltas = [m.block.like_view(d) for m, d in zip(stack.members, delta.unbind(0))]
    descend(stepped(stack, weights), stepped(stack, deltas), config, decay)


def stepped(stack: Stack, values: Sequence[_T]) -> list[_T]:
    """Of one value for each matrix, those of the matrices that the host does not know to skip the step."""
    return [value for position, value in enumerate(values) if position not in stack.skipped]


def descend(
    weights: list[Tensor], deltas: list[Tensor], config: ApplyConfig, decay: float | Tensor | None = None
) -> None:
    """W ← decay·W - lr·Δ for tensors of any shape, of one dtype; Δ may be overwritten.

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


def _in_place(stack: Stack, weights: Sequence[Tensor]) -> bool:
    """Whether factors are multiplied straight into the weights: on a CPU that saves two passes over memory,
    on a GPU it would cost a launch per matrix."""
    return (
        stack.masked is None
        and weights[0].device.type == "cpu"
        and weights[0].dtype == stack.dtype
        and weights[0].ndim == 2
    )


def _apply_factors(stack: Stack, weights: list[Tensor], delta: LowRank, config: ApplyConfig) -> None:
    lr = float(config.lr)
    decay = 1.0 - lr * config.weight_decay
    weights = stepped(stack, weights)
    if not weights:
        return
    if decay != 1.0 and not config.decay_last:
        torch._foreach_mul_(weights, decay)  # pyright: ignore[reportPrivateImportUsage]
    if delta.keep:
        gradients = [_gradient_of(m).to(stack.dtype) for m in stepped(stack, stack.members)]
        torch._foreach_add_(weights, gradients, alpha=-lr * delta.keep)  # pyright: ignore[reportPrivateImportUsage]
    lefts, rights = stepped(stack, delta.left.unbind(0)), stepped(stack, delta.right.unbind(0))
    for weight, left, right in zip(weights, lefts, rights):
        weight.addmm_(left, right, alpha=-lr)
    if decay != 1.0 and config.decay_last:
        torch._foreach_mul_(weights, decay)  # pyright: ignore[reportPrivateImportUsage]
