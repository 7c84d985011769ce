"""What an optimizer was given and what became of the weights, step by step, as whole tensors."""

from __future__ import annotations

import hashlib
from collections import Counter
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from harness.loop import Run
from harness.protocols import MetricRow
from harness.tracked_optimizer import tracked


class Gradients(Protocol):
    """How to see what an optimizer is about to use."""

    def look(self) -> dict[str, Tensor]:
        """Parameter name → whole gradient, of the parameters that this call of the optimizer's `step` updates.

        On every process; where it holds a part of it, zeros elsewhere, to be summed.
        """
        ...

    @property
    def is_summed(self) -> bool:
        """Whether processes hold parts."""
        ...


class OfLayout:
    """Gradients as an `optimizers.Optimizer` reads them through its layout, whatever an engine put in its groups."""

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer
        self._shapes = {route.name: route.shape for route in optimizer.routes}

    @property
    def is_summed(self) -> bool:
        """Where weights are cut."""
        return any(
            self._dimension(p) is not None for group in self._optimizer.parameters_of_groups for p in group
        )

    def _dimension(self, parameter: Tensor) -> int | None:
        return self._optimizer.layout.interval(parameter)[0]

    def look(self) -> dict[str, Tensor]:
        """See `Gradients`."""
        layout, found = self._optimizer.layout, {}
        for unit in layout.step_units(self._optimizer.param_groups):
            for position in unit.positions:
                parameter = self._optimizer.parameters_of_groups[unit.group][position]
                name = self._optimizer.name_of(parameter)
                here = layout.gradient(parameter)
                if here is not None:
                    found[name] = self._whole(parameter, here.detach(), self._shapes[name])
        return found

    def _whole(self, parameter: Tensor, here: Tensor, shape: tuple[int, ...]) -> Tensor:
        layout = self._optimizer.layout
        dimension, start = layout.interval(parameter)
        if dimension is None:
            return here.clone()
        whole = here.new_zeros(shape)
        # Replicas hold the same interval: one of them speaks for it.
        if layout.is_first_replica:
            target = whole.view(-1) if dimension == -1 else whole
            target.narrow(max(dimension, 0), start, here.shape[max(dimension, 0)]).copy_(here)
        return whole


class OfParameters:
    """Gradients of any torch optimizer, as they lie in `.grad` of whole parameters or DTensors."""

    is_summed = False

    def __init__(self, named: dict[str, Tensor]) -> None:
        self._named = named

    def look(self) -> dict[str, Tensor]:
        """See `Gradients`; a collective for DTensors."""
        found = {}
        for name, parameter in self._named.items():
            gradient = parameter.grad
            if gradient is not None:
                found[name] = (
                    (gradient.full_tensor() if isinstance(gradient, DTensor) else gradient).detach().clone()
                )
        return found


class Witness:
    """A probe of every step.

    It wraps the optimizer's `step`, so that it sees what the engine delivers: reduced, unscaled and clipped.

    Attributes:
        gradients: of each step, parameter name → whole gradient. On rank 0 only, as all that follows.
        weights: steps done → name → whole fp32 weight: before the first step, after `kept` and after the last.
        grad_norms: what the engine reports: the global norm before clipping.
        orthogonalized: of each step, matrix → how often this process orthogonalized it. On every rank.
        sent, collectives: bytes that the optimizer sent from this process in each step, and collectives that it
            issued; 0 where it does not count them.
    """

    def __init__(self, run: Run, gradients: Gradients, kept: int) -> None:
        self._run, self._source = run, gradients
        self._kept = {kept, run.config.steps}
        self.gradients: list[dict[str, Tensor]] = []
        self.weights: dict[int, dict[str, Tensor]] = {0: run.engine.full_weights()}
        self.grad_norms: list[float] = []
        self.orthogonalized: list[dict[str, int]] = []
        self.sent: list[float] = []
        self.collectives: list[int] = []
        self._seen: dict[str, Tensor] = {}
        self._counts: Counter[str] = Counter()
        self._before = 0.0, 0
        self._watch(run.optimizer)

    def _watch(self, optimizer: Any) -> None:
        step = optimizer.step

        def watched_step(*args: Any, **kwargs: Any) -> Any:
            self._seen.update(self._source.look())
            return step(*args, **kwargs)

        optimizer.step = watched_step
        stats = getattr(optimizer, "stats", None)
        if stats is None:
            return
        record = stats.record

        def watched_record(rule: Any, stack: Any, update: Any, *rest: Any) -> None:
            if update.factor is not None:
                self._counts.update(stack.names)
            record(rule, stack, update, *rest)

        stats.record = watched_record

    def due(self, step: int) -> bool:
        """Every step."""
        return True

    def before_update(self, step: int) -> None:
        """Start on a step."""
        self._seen = {}
        self._before = self._traffic()

    def state(self) -> dict[str, Any]:
        """Nothing: runs of certificates are not resumed."""
        return {}

    def restore(self, state: dict[str, Any], steps: int) -> None:
        """Nothing."""

    def measure(self, step: int, row: MetricRow) -> None:
        """Gather what the step did (a collective)."""
        norm = self._run.state.grad_norm
        assert norm is not None
        self.grad_norms.append(float(norm))
        self.orthogonalized.append(dict(self._counts))
        self._counts.clear()
        sent, collectives = self._traffic()
        self.sent.append(sent - self._before[0])
        self.collectives.append(collectives - self._before[1])
        if self._source.is_summed:
            _sum(list(self._seen.values()))
        if self._run.engine.rank == 0:
            self.gradients.append(self._seen)
        if step + 1 in self._kept:
            self.weights[step + 1] = self._run.engine.full_weights()

    @property
    def start(self) -> dict[str, Tensor]:
        """Weights before the first step."""
        return self.weights[0]

    @property
    def end(self) -> dict[str, Tensor]:
        """The last weights that were kept."""
        return self.weights[max(self.weights)]

    def _traffic(self) -> tuple[float, int]:
        optimizer = tracked(self._run.optimizer)
        return sum(optimizer.bytes_sent().values()), optimizer.collective_calls()


def _sum(parts: list[Tensor]) -> None:
    """Over processes, in place and in one collective."""
    flat = torch.cat([part.reshape(-1) for part in parts])
    dist.all_reduce(flat)
    for part, whole in zip(parts, flat.split([part.numel() for part in parts])):
        part.copy_(whole.view(part.shape))


def replica_digests(run: Run, weights: dict[str, Tensor]) -> dict[str, str]:
    """What must be equal between processes → a hash of this process' weights; and of the masters on rank 0.

    Args:
        run: after training.
        weights: whole fp32 weights (on rank 0), of which working copies are roundings.

    Returns:
        Keys of the form "replica:who". Nothing where no process holds what another one holds.
    """
    engine = run.engine
    named = {name.removeprefix("module."): p.detach() for name, p in engine.model.named_parameters()}
    if engine.name == "hsdp":
        local = [p.to_local() for p in named.values() if isinstance(p, DTensor)]
        shard = engine.rank % engine.shards
        return {f"shard {shard}:rank {engine.rank}": _digest(local)}
    if engine.name not in ("ddp", "zero0", "zero1", "zero2"):
        return {}
    found = {f"weights:rank {engine.rank}": _digest(list(named.values()))}
    if engine.rank == 0:
        found["weights:masters"] = _digest([weights[name].to(p.dtype) for name, p in named.items()])
    return found


def _digest(tensors: list[Tensor]) -> str:
    total = hashlib.sha256()
    for tensor in tensors:
        total.update(tensor.contiguous().view(torch.uint8).cpu().numpy().tobytes())
    return total.hexdigest()
