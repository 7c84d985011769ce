"""Record the gradients that an optimizer receives and the weights that it makes, step by step, as unsharded tensors."""

from __future__ import annotations

import hashlib
from collections import Counter
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

import optimizers
from harness.loop import Run
from harness.protocols import MetricRow
from harness.tracked_optimizer import tracked


class GradientSource(Protocol):
    """Reads the gradients that an optimizer is about to use."""

    def look(self) -> dict[str, Tensor]:
        """Return parameter name → unsharded gradient of the parameters that this call of `step` updates.

        On every process; a process that holds a part fills the rest with zeros, to be summed over processes.
        """
        ...

    @property
    def is_summed(self) -> bool:
        """Return True if processes hold parts, which must be summed."""
        ...


class LayoutGradients:
    """The gradients that an `optimizers.Optimizer` reads through its layout, whatever an engine put in its groups."""

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer
        self._shapes = {route.name: route.shape for route in optimizer.routes}

    @property
    def is_summed(self) -> bool:
        """Return True if any weight is split over processes."""
        return any(
            self._dimension(p) is not None for group in self._optimizer.parameters_of_groups for p in group
        )

    def _dimension(self, parameter: Tensor) -> int | None:
        return self._optimizer.layout.interval(parameter)[0]

    def look(self) -> dict[str, Tensor]:
        """Return name → unsharded gradient, with zeros for the parts of other processes."""
        layout, gradients = self._optimizer.layout, {}
        for unit in layout.step_units(self._optimizer.param_groups):
            for position in unit.positions:
                parameter = self._optimizer.parameters_of_groups[unit.group][position]
                name = self._optimizer.name_of(parameter)
                here = layout.gradient(parameter)
                if here is not None:
                    gradients[name] = self._unsharded(parameter, here.detach(), self._shapes[name])
        return gradients

    def _unsharded(self, parameter: Tensor, here: Tensor, shape: tuple[int, ...]) -> Tensor:
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


class ParameterGradients:
    """The gradients of any torch optimizer, in `.grad` of unsharded parameters or DTensors."""

    is_summed = False

    def __init__(self, named: dict[str, Tensor]) -> None:
        self._named = named

    def look(self) -> dict[str, Tensor]:
        """Return name → unsharded gradient; a collective for DTensors."""
        gradients = {}
        for name, parameter in self._named.items():
            gradient = parameter.grad
            if gradient is not None:
                gradients[name] = (
                    (gradient.full_tensor() if isinstance(gradient, DTensor) else gradient).detach().clone()
                )
        return gradients


class StepRecorder:
    """A probe of every step that records gradients, weights and the work of the optimizer.

    It wraps the optimizer's `step`, so it sees the gradients as the engine delivers them: reduced, unscaled, clipped.

    Args:
        run: assembled, before its first step.
        gradients: reads the gradients.
        kept: number of steps after which the weights are kept, too.

    Attributes:
        gradients: per step, parameter name → unsharded gradient; on rank 0 only.
        trained: names of the parameters that are not frozen.
        weights: steps done → name → unsharded fp32 weight, before the first step, after ``kept`` and after the last; on
            rank 0 only.
        grad_norms: per step, the global norm before clipping that the engine reports.
        orthogonalized: per step, matrix → how often this process orthogonalized it; on every rank.
        sent, collectives: per step, bytes that the optimizer sent from this process, and collectives that it issued; 0
            for an optimizer that does not count them.
    """

    def __init__(self, run: Run, gradients: GradientSource, kept: int) -> None:
        self._run, self._source = run, gradients
        self._kept = {kept, run.config.steps}
        self.gradients: list[dict[str, Tensor]] = []
        # Asked of the model, so that a parameter which an engine loses is missed.
        self.trained = {
            name.removeprefix("module.") for name, p in run.engine.model.named_parameters() if p.requires_grad
        }
        self.weights: dict[int, dict[str, Tensor]] = {0: run.engine.full_weights()}
        self.grad_norms: list[float] = []
        self.orthogonalized: list[dict[str, int]] = []
        self.sent: list[float] = []
        self.collectives: list[int] = []
        self._received: dict[str, Tensor] = {}
        self._counts: Counter[str] = Counter()
        self._before = 0.0, 0
        self._wrap(run.optimizer)

    def _wrap(self, optimizer: Any) -> None:
        step = optimizer.step

        def recorded_step(*args: Any, **kwargs: Any) -> Any:
            self._received.update(self._source.look())
            return step(*args, **kwargs)

        optimizer.step = recorded_step
        if not isinstance(optimizer, optimizers.Optimizer):
            return
        record = optimizer.stats.record

        def watched_record(rule: Any, batch: Any, update: Any, collectives: Any) -> None:
            if update.factor is not None:
                self._counts.update(batch.names)
            record(rule, batch, update, collectives)

        optimizer.stats.record = watched_record

    def due(self, step: int) -> bool:
        """Return True: every step is recorded."""
        return True

    def before_update(self, step: int) -> None:
        """Begin to record a step."""
        self._received = {}
        self._before = self._traffic()

    def state(self) -> dict[str, Any]:
        """Return nothing: runs of certificates are not resumed."""
        return {}

    def restore(self, state: dict[str, Any], steps: int) -> None:
        """Do nothing: runs of certificates are not resumed."""

    def measure(self, step: int, row: MetricRow) -> None:
        """Record what the step did (a collective)."""
        norm = self._run.state.grad_norm
        assert norm is not None
        self.grad_norms.append(float(norm))
        self.orthogonalized.append(dict(self._counts))
        self._counts.clear()
        sent, collectives = self._traffic()
        self.sent.append(sent - self._before[0])
        self.collectives.append(collectives - self._before[1])
        if self._source.is_summed:
            _sum(list(self._received.values()))
        if self._run.engine.rank == 0:
            self.gradients.append(self._received)
        if step + 1 in self._kept:
            self.weights[step + 1] = self._run.engine.full_weights()

    @property
    def start(self) -> dict[str, Tensor]:
        """Return the weights before the first step."""
        return self.weights[0]

    @property
    def end(self) -> dict[str, Tensor]:
        """Return the last weights that were kept."""
        return self.weights[max(self.weights)]

    def _traffic(self) -> tuple[float, int]:
        optimizer = tracked(self._run.optimizer)
        return sum(optimizer.bytes_sent().values()), optimizer.collective_calls()


def _sum(parts: list[Tensor]) -> None:
    """Sum tensors over processes, in place and in one collective."""
    flat = torch.cat([part.reshape(-1) for part in parts])
    dist.all_reduce(flat)
    for part, whole in zip(parts, flat.split([part.numel() for part in parts])):
        part.copy_(whole.view(part.shape))


def replica_digests(run: Run, weights: dict[str, Tensor]) -> dict[str, str]:
    """Return a hash of what other processes hold, too: this process' weights, and the masters on rank 0.

    Args:
        run: after training.
        weights: unsharded fp32 weights (on rank 0), of which working copies are roundings.

    Returns:
        "replica:holder" → SHA-256; hashes of one replica must be equal. {} if no process holds a copy of another's.
    """
    engine = run.engine
    named = {name.removeprefix("module."): p.detach() for name, p in engine.model.named_parameters()}
    if engine.name == "hsdp":
        local = [p.to_local() for p in named.values() if isinstance(p, DTensor)]
        shard = engine.rank % engine.shards
        return {f"shard {shard}:rank {engine.rank}": _digest(local)}
    if engine.name not in ("ddp", "zero0", "zero1", "zero2"):
        return {}
    digests = {f"weights:rank {engine.rank}": _digest(list(named.values()))}
    if engine.rank == 0:
        digests["weights:masters"] = _digest([weights[name].to(p.dtype) for name, p in named.items()])
    return digests


def _digest(tensors: list[Tensor]) -> str:
    total = hashlib.sha256()
    for tensor in tensors:
        total.update(tensor.contiguous().view(torch.uint8).cpu().numpy().tobytes())
    return total.hexdigest()
