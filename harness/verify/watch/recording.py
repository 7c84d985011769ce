"""Record a few updates of each optimizer: weights before and after, and the gradients that led from one to the next."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from harness.verify.watch.clip_listener import ClipListener
from harness.verify.watch.targets import Part, Target, Undo

KEPT_MICRO_BATCHES = 8
FOLLOWED = 4
"""Of so many matrices the gradient after each of so many micro-batches is kept, to see whether momentum advances with
each of them."""


@dataclass
class Settings:
    """Settings of a parameter's group in one update: every number, word and pair of the group."""

    values: Mapping[str, Any]

    def number(self, *keys: str, default: float | None = None) -> float | None:
        """Return the first of these settings that is there, as a number."""
        for key in keys:
            value = self.values.get(key)
            if isinstance(value, Tensor) and value.numel() == 1:
                return float(value)
            if isinstance(value, int | float) and not isinstance(value, bool):
                return float(value)
        return default


@dataclass
class ParameterRecord:
    """What was recorded of one parameter. Tensors are whole, on the CPU, in the dtype of the training.

    Attributes:
        name, shape: of the parameter in the unwrapped model.
        group: index of its group in the optimizer.
        shards: axis and number of the shards that it is cut into.
        state: the optimizer's tensors of it before the first update.
        weights: before the first update and after each, one more than updates.
        gradients: of each update, as the optimizer received it (from autograd under DeepSpeed); None: there was none.
        micro: of each update, the gradient accumulated after each micro-batch, where there were several.
        settings: of its group, in each update.
    """

    name: str
    shape: tuple[int, ...]
    group: int
    shards: tuple[int, int]
    state: dict[str, Tensor]
    weights: list[Tensor]
    gradients: list[Tensor | None] = field(default_factory=list)
    micro: list[list[Tensor]] = field(default_factory=list)
    settings: list[Settings] = field(default_factory=list)


@dataclass
class StepFacts:
    """What was recorded of one update as a whole.

    Attributes:
        received_norm: of the gradients of all parameters of this optimizer, as it received them.
        raw_norm, max_norm: what torch's clipping measured and was asked for, or what the backend says; None: unknown.
        ratio: received gradient over the mean of the ranks' own gradients, by parameter; only with several ranks.
        unlike: relative distance of the received gradient from the best multiple of that mean.
        micro_batches: backward passes since the last update (0: not counted).
    """

    received_norm: float
    raw_norm: float | None
    max_norm: float | None
    ratio: dict[str, float] = field(default_factory=dict)
    unlike: dict[str, float] = field(default_factory=dict)
    micro_batches: int = 0


class PartRecording:
    """The recorded updates of one optimizer.

    Args:
        target: gives whole tensors.
        part: the optimizer.
        names: of the parameters whose tensors are kept.
        steps: updates to record.
        clip: hears torch's clipping.
        keeps: whether this rank keeps what all ranks read.
        done: called once after the last update.
    """

    def __init__(
        self,
        target: Target,
        part: Part,
        names: Sequence[str],
        steps: int,
        clip: ClipListener,
        keeps: bool,
        done: Callable[[], None],
    ) -> None:
        self.target, self.part, self.steps = target, part, steps
        self.facts: list[StepFacts] = []
        self._clip, self._keeps, self._done = clip, keeps, done
        self._heard = 0
        wanted = set(names)
        self.records: dict[str, ParameterRecord] = {}
        for index, (_, members) in enumerate(part.groups()):
            for name in members:
                if name not in wanted:
                    continue
                state = {key: _kept(value, keeps) for key, value in target.state(part, name).items()}
                start = _kept(target.weight(name), keeps)
                shape, shards = target.shape(name), target.shards(name)
                self.records[name] = ParameterRecord(name, shape, index, shards, state, [start])
        every = [name for _, members in part.groups() for name in members]
        followed = [name for name, record in self.records.items() if len(record.shape) == 2]
        self._leaves = LeafGradients(target, every, followed[:FOLLOWED])
        self._undo = [self._leaves.stop, part.on_step(self._before, self._after)]

    @property
    def is_complete(self) -> bool:
        """Return True once all updates are recorded."""
        return len(self.facts) >= self.steps

    def stop(self) -> None:
        """Remove every hook."""
        while self._undo:
            self._undo.pop()()

    @torch.no_grad()
    def _before(self) -> None:
        if self.is_complete:
            return
        target = self.target
        from_autograd = target.takes_leaf_gradients
        leaf = self._leaves.take(self.part) if self._leaves.is_on else {}
        total = 0.0
        micro_batches = self._leaves.micro_batches()
        raw_norm, max_norm, by_parts = self._clipping()
        facts = StepFacts(0.0, raw_norm, max_norm, micro_batches=micro_batches)
        for group, members in self.part.groups():
            settings = Settings({key: _setting(value) for key, value in group.items() if key != "params"})
            for name in members:
                gradient = leaf.get(name) if from_autograd else target.gradient(name)
                if gradient is not None:
                    if gradient.is_sparse:
                        # Its values may hold a row twice until they are added up.
                        gradient = gradient.coalesce()
                    total += (
                        float((gradient.values() if gradient.is_sparse else gradient).float().norm()) ** 2
                    )
                if target.compares_leaf_gradients and gradient is not None and name in leaf and not by_parts:
                    _compare(facts, name, gradient.to_dense(), leaf[name])
                record = self.records.get(name)
                if record is None:
                    continue
                record.gradients.append(None if gradient is None else _kept(gradient, self._keeps))
                record.settings.append(settings)
                partial = self._leaves.after_micro_batches(name, micro_batches)
                record.micro.append([_kept(g, self._keeps) for g in partial])
        facts.received_norm = total**0.5
        self.facts.append(facts)
        self._leaves.clear()

    @torch.no_grad()
    def _after(self) -> None:
        if not self.facts or len(self.facts) < len(next(iter(self.records.values())).weights):
            return
        for record in self.records.values():
            record.weights.append(_kept(self.target.weight(record.name), self._keeps))
        if self.part.engine and (norm := self.target.engine_norm()) is not None:
            self.facts[-1].raw_norm = norm
        if self.is_complete:
            self.stop()
            self._done()

    def _clipping(self) -> tuple[float | None, float | None, bool]:
        """Return the norm before clipping, the bound, and whether gradients were clipped by parts instead."""
        self._heard, heard = self._clip.since(self._heard)
        if heard is None or not heard.is_whole:
            return None, self.part.engine.get("max_norm"), heard is not None
        norm = heard.norm.full_tensor() if isinstance(heard.norm, DTensor) else heard.norm
        # An infinite bound is the usual way to measure the norm: it is none.
        return float(norm), heard.bound if math.isfinite(heard.bound) else None, False


class LeafGradients:
    """Gradients as autograd delivers them, before DDP or DeepSpeed reduce, clip or replace them.

    A hook on each parameter adds up what the backward passes since the last update brought to this rank. Hooks of
    DTensors never fire, because FSDP2 differentiates the gathered weight: there, nothing is added up.

    Args:
        target: says whether the sums are wanted.
        names: parameters to follow.
        followed: those of which the sum after each micro-batch is kept, too.
    """

    def __init__(self, target: Target, names: Sequence[str], followed: Sequence[str]) -> None:
        self.is_on = target.takes_leaf_gradients or target.compares_leaf_gradients
        self._target, self._followed = target, set(followed)
        self._sums: dict[str, Tensor] = {}
        self._partial: dict[str, list[Tensor]] = {}
        self._counts: dict[str, int] = {}
        self._names = [
            name
            for name in names
            if target.named[name].requires_grad and not isinstance(target.named[name], DTensor)
        ]
        self._handles = [target.named[name].register_hook(self._hook(name)) for name in self._names]
        self._is_distributed = dist.is_initialized() and dist.get_world_size() > 1 and not target.is_sharded

    def _hook(self, name: str) -> Callable[[Tensor], None]:
        is_followed = name in self._followed

        def seen(gradient: Tensor) -> None:
            self._counts[name] = self._counts.get(name, 0) + 1
            if not (self.is_on or is_followed):
                return
            kept = self._sums.get(name)
            gradient = gradient.detach().to_dense().float()
            self._sums[name] = gradient.clone() if kept is None else kept + gradient
            partial = self._partial.setdefault(name, [])
            if is_followed and len(partial) < KEPT_MICRO_BATCHES:
                partial.append(self._sums[name])

        return seen

    def micro_batches(self) -> int:
        """Return the number of backward passes since the last update; 0 if ranks disagree (a collective)."""
        count = max(self._counts.values(), default=0)
        if not self._is_distributed:
            return count
        device = next(iter(self._target.named.values())).device
        extremes = torch.tensor([count, -count], device=device)
        dist.all_reduce(extremes, op=dist.ReduceOp.MAX)
        largest, smallest = extremes.tolist()
        return largest if largest == -smallest else 0

    def after_micro_batches(self, name: str, count: int) -> list[Tensor]:
        """Return the mean over ranks of the gradient after each micro-batch (a collective); [] for a single one."""
        if name not in self._followed or not 1 < count <= KEPT_MICRO_BATCHES:
            return []
        partial = self._partial.get(name) or [torch.zeros(self._target.shape(name))]
        return [self._mean(partial[min(i, len(partial) - 1)]) for i in range(count)]

    def take(self, part: Part) -> dict[str, Tensor]:
        """Return name → gradient summed over micro-batches, mean over ranks, without the loss scale (a collective)."""
        scale = part.engine["loss_scale"]() if "loss_scale" in part.engine else 1.0
        gradients = {}
        for name in self._names:
            local = self._sums.get(name)
            if local is None:
                # Another rank may have one: every rank takes part in the reduction of every parameter.
                device = self._target.named[name].device
                local = torch.zeros(self._target.shape(name), device=device)
            gradients[name] = self._mean(local) / scale
        return gradients

    def clear(self) -> None:
        """Forget what was added up."""
        self._sums, self._partial, self._counts = {}, {}, {}

    def stop(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self.clear()

    def _mean(self, gradient: Tensor) -> Tensor:
        total = gradient.clone()
        if self._is_distributed:
            dist.all_reduce(total)
            total /= dist.get_world_size()
        return total


def _compare(facts: StepFacts, name: str, received: Tensor, mean: Tensor) -> None:
    """Note how the received gradient relates to the mean over ranks."""
    a, b = received.double().flatten(), mean.double().flatten()
    size = float(b.norm())
    if size == 0.0:
        return
    ratio = float(a @ b) / size**2
    facts.ratio[name] = ratio
    facts.unlike[name] = float((a - ratio * b).norm()) / max(float(a.norm()), 1e-300)


def _kept(tensor: Tensor, keeps: bool) -> Tensor:
    """Return a copy on the CPU, or nothing on a rank that does not keep it."""
    return tensor.to("cpu", copy=True) if keeps else tensor.new_empty(0)


def _setting(value: Any) -> Any:
    """Return a group's setting as it is now: a tensor learning rate changes in place."""
    return value.detach().clone() if isinstance(value, Tensor) else value


def unequal_copies(target: Target) -> list[str]:
    """Return the parameters of which two ranks hold different copies (a collective)."""
    if not (dist.is_initialized() and dist.get_world_size() > 1):
        return []
    mine = {(name, shard): _digest(local) for name, shard, local in target.copies()}
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, mine)
    seen: dict[tuple[str, str], str] = {}
    unequal: dict[str, None] = {}
    for digests in gathered:
        for key, digest in digests.items():
            if seen.setdefault(key, digest) != digest:
                unequal[key[0]] = None
    return list(unequal)


def _digest(tensor: Tensor) -> str:
    data = tensor.contiguous().view(-1).view(torch.uint8).cpu().numpy()
    return hashlib.sha256(data.tobytes()).hexdigest()


def choose(target: Target, part: Part, steps: int, max_bytes: int) -> list[str]:
    """Return the parameters to keep: all, or as many as `max_bytes` allow, from every group and shape in turn.

    The choice depends on names and shapes only, so that all ranks make the same one.
    """
    classes: dict[tuple[int, tuple[int, ...]], list[str]] = {}
    for index, (_, members) in enumerate(part.groups()):
        for name in members:
            classes.setdefault((index, target.shape(name)), []).append(name)
    chosen: list[str] = []
    left = max_bytes
    while any(classes.values()):
        for members in classes.values():
            if members:
                # First and last layers first: what differs between layers most often differs there.
                name = members.pop(0 if len(chosen) % 2 == 0 else -1)
                left -= bytes_of(target, name, steps)
                if left >= 0 or not chosen:
                    chosen.append(name)
    return chosen


def bytes_of(target: Target, name: str, steps: int) -> int:
    """Return the bytes that the record of a parameter takes, without the optimizer's state and micro-batches."""
    numel = 1
    for side in target.shape(name):
        numel *= side
    return numel * target.named[name].element_size() * (2 * steps + 1)


__all__ = ["ParameterRecord", "PartRecording", "Settings", "StepFacts", "Undo", "choose", "unequal_copies"]
