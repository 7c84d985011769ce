"""The training loop, and the parts of a run that it works on."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from harness.config.schema import RunConfig
from harness.memory_phases import MemoryPhases
from harness.process.garbage import collected_between_steps
from harness.process.heartbeat import Heartbeat
from harness.process.stop import Stop
from harness.profiling import Clock
from harness.protocols import (
    BatchLoader,
    CheckpointManager,
    Engine,
    LogitCollector,
    MetricRow,
    NoCheckpoints,
    Objective,
    Probe,
    Sink,
    StepObserver,
)
from harness.schedule import Factor

if TYPE_CHECKING:
    from harness.protocols import MicroBatch

_MEAN_WEIGHT = 0.98
"""Weight of the past in the spike guard's running mean: about the last 50 steps."""


@dataclass
class TrainState:
    """Running totals of a run on the host."""

    step: int = 0
    """Steps done."""
    tokens: int = 0
    """Tokens trained on so far, over all processes, padding not included."""
    wall_s: float = 0.0
    skipped: int = 0
    """Steps whose gradient was not finite, so that they changed nothing."""
    stop_requested: bool = False
    checkpoint_wanted: bool = False
    """Any process wanted a checkpoint when the last flags that were read were set."""
    checkpoint_writing: bool = False
    """Any process was writing one at that time."""
    loss: torch.Tensor | None = None
    """Loss sum of this process since the last row, nats, 0-dim."""
    aux_loss: torch.Tensor | None = None
    """The same for the routers' load-balancing loss; None: the model has none."""
    loss_tokens: int = 0
    """What the loss sums of all processes since the last row are divided by: tokens, or examples."""
    grad_norm: torch.Tensor | None = None
    """Global gradient norm of the last step before clipping, 0-dim."""
    pending: Callable[[], list[float]] | None = None
    """Flags of the last step: read one step late, so that the host never waits for the device."""


@dataclass(frozen=True)
class ModelInfo:
    """Facts of the model that were counted before an engine cut it.

    Attributes:
        parameters: trainable ones, tied ones once.
        routes: which parameter takes which rule, as parameters.json has it.
        flops_per_token: forward and backward.
        peak_flops: dense peak of one device, FLOP/s; None where it is unknown, such as on a CPU.
        notes: what the model's code did not allow (`harness.model.specialize`), one line each.
    """

    parameters: int
    routes: list[dict[str, Any]]
    flops_per_token: float
    peak_flops: float | None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Run:
    """The parts of a run, as `harness.run.assemble` puts them together. Only `state` changes."""

    config: RunConfig
    engine: Engine
    model: nn.Module
    info: ModelInfo
    optimizer: torch.optim.Optimizer
    objective: Objective
    lr_factor: Factor
    loader: BatchLoader
    clock: Clock
    memory: MemoryPhases
    stop: Stop
    spikes: SpikeGuard | None = None
    attention_logits: LogitCollector | None = None
    """Of the step's forward passes, where the optimizer clips by them."""
    devices: Sequence[Mapping[str, Any]] = ()
    """Facts of each process' device, by rank."""
    state: TrainState = field(default_factory=TrainState)


@dataclass(frozen=True)
class Callbacks:
    """What happens around the steps of a run: measuring, recording, saving, watching.

    Attributes:
        probes: in the order in which they measure.
        sinks: take the rows on rank 0.
        checkpoints: saves and restores.
        heartbeat: told the current step.
        observer: told the end of each step.
    """

    probes: Sequence[Probe] = ()
    sinks: Sequence[Sink] = ()
    checkpoints: CheckpointManager = field(default_factory=NoCheckpoints)
    heartbeat: Heartbeat | None = None
    observer: StepObserver | None = None

    def before_step(self, step: int) -> list[Probe]:
        """Prepare for a step and return the probes that are due in it."""
        if self.heartbeat is not None:
            self.heartbeat.step = step + 1
        self.checkpoints.before_step()
        return [probe for probe in self.probes if probe.due(step)]

    def after_step(self, run: Run, step: int, due: Sequence[Probe]) -> None:
        """Write the row of a step with probes that are due, save, and tell the observer."""
        if due:
            write_row(run, step, due, self.sinks)
        state = run.state
        self.checkpoints.after_step(wanted=state.checkpoint_wanted, writing=state.checkpoint_writing)
        if self.observer is not None:
            self.observer.step()


def train(run: Run, callbacks: Callbacks) -> str:
    """Train to the end, to a stop signal or to divergence.

    Returns:
        The state to record (`harness.record.schema.STATES`).
    """
    config, state, checkpoints = run.config, run.state, callbacks.checkpoints
    if state.step == 0:
        # Since the clock was made, the run folder was opened and W&B was started.
        run.clock.read()
    # What building and resuming held is not what training needs.
    run.memory.enter("training")
    with collected_between_steps() as collect:
        for step in range(state.step, config.steps):
            due = callbacks.before_step(step)
            if not train_step(run, callbacks, step, due):
                break
            callbacks.after_step(run, step, due)
            collect(step + 1)
    drain_pending(run)
    is_diverged = state.skipped > config.max_skipped_steps
    if state.step < config.steps and not is_diverged:
        checkpoints.stop()
        return "interrupted"
    checkpoints.finish()
    if is_diverged:
        return "diverged"
    # A finished run promises its weights: without them the same command has to be able to continue.
    return "failed" if checkpoints.problem else "finished"


def train_step(run: Run, callbacks: Callbacks, step: int, due: Sequence[Probe]) -> bool:
    """Make one optimizer step; returns False, without an update, if the flags of the step before end the run."""
    config, engine, clock, state, checkpoints = (
        run.config,
        run.engine,
        run.clock,
        run.state,
        callbacks.checkpoints,
    )
    # Timers may cost the host a wait, so that only steps with a row have them.
    engine.measure_communication(bool(due))
    with clock.part("data"):
        micro_batches = run.loader.micro_batches(step)
        loss_tokens, tokens = run.loader.loss_tokens(step), run.loader.tokens(step)
    with clock.part("forward_backward"):
        # Not right after the update: a row in between counts the gradients' bytes.
        run.optimizer.zero_grad(set_to_none=True)
        if run.attention_logits is not None:
            run.attention_logits.begin()
        loss, aux_loss = forward_backward(run, micro_batches, weight=engine.world_size / loss_tokens)
    with clock.part("optimizer"):
        drain_pending(run)
        if state.stop_requested or state.skipped > config.max_skipped_steps:
            return False
        for probe in due:
            probe.before_update(step)
        # The factor depends on the step alone, so a resumed run has the same rates.
        set_lr(run.optimizer, run.lr_factor(step))
        if run.spikes is not None:
            run.spikes.check(loss, loss_tokens)
        if run.attention_logits is not None:
            run.attention_logits.give(run.optimizer)
        state.grad_norm, nonfinite = engine.step(config.max_grad_norm)
        # One small reduction for all that the processes must agree on.
        flags = (run.stop.requested, checkpoints.is_wanted, checkpoints.is_writing)
        state.pending = engine.reduce_flags(
            torch.stack([nonfinite, *(torch.full_like(nonfinite, flag) for flag in flags)])
        )
    state.loss = loss if state.loss is None else state.loss + loss
    if aux_loss is not None:
        state.aux_loss = aux_loss if state.aux_loss is None else state.aux_loss + aux_loss
    state.loss_tokens += loss_tokens
    state.tokens += tokens
    state.step = step + 1
    return True


class LossSums(NamedTuple):
    """What one process saw in one step: 0-dim sums over its loss tokens.

    Attributes:
        loss: cross-entropy, nats.
        aux: load-balancing loss before its coefficient; None where the model has none.
    """

    loss: torch.Tensor
    aux: torch.Tensor | None


def forward_backward(run: Run, micro_batches: Sequence[MicroBatch], weight: float) -> LossSums:
    """Accumulate the gradient of the token-weighted mean loss; return this process' loss sums.

    Args:
        run: assembled.
        micro_batches: of this process in one step.
        weight: world_size over the loss tokens of the *global* batch. The engine averages gradients over processes,
            so the result is the mean over all tokens of the step, however they were dealt out. The routers' loss of
            a micro-batch is weighted with the micro-batch's tokens (`harness.model.loss`).
    """
    total = torch.zeros((), device=run.engine.device)
    aux_total: torch.Tensor | None = None
    for index, batch in enumerate(micro_batches):
        with run.engine.micro_step(last=index == len(micro_batches) - 1):
            inputs = run.objective.inputs(batch)
            with run.clock.part("forward"), run.engine.autocast():
                outputs = run.engine.model(**inputs)
            objective, loss, aux_loss = run.objective.losses(outputs, batch)
            run.engine.backward(objective * weight)
        # Sums stay on the device; `mean_losses` reads them once per row.
        total += loss.detach()
        if aux_loss is not None:
            aux_total = aux_loss.detach() if aux_total is None else aux_total + aux_loss.detach()
    return LossSums(total, aux_total)


def drain_pending(run: Run) -> None:
    """Read the flags of the last step, if they were not read yet, and let the host catch up with them."""
    state = run.state
    if state.pending is None:
        return
    # Maxima over all processes, so that all act alike in the same step.
    nonfinite, stop, wanted, writing = state.pending()
    state.pending = None
    if nonfinite:
        state.skipped += 1
        run.engine.undo_step_counters()
    state.stop_requested, state.checkpoint_wanted, state.checkpoint_writing = (
        bool(stop),
        bool(wanted),
        bool(writing),
    )


def set_lr(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Scale each group's peak learning rate, except in groups with ``scheduled=False``."""
    for group in optimizer.param_groups:
        if group.get("scheduled", True):
            group["lr"] = group.setdefault("initial_lr", group["lr"]) * factor


def write_row(run: Run, step: int, due: Sequence[Probe], sinks: Sequence[Sink]) -> None:
    """Measure what is due and hand the row to the sinks: the one place where the host waits for the device."""
    drain_pending(run)
    row: MetricRow = {"step": run.state.step, "tokens": run.state.tokens}
    for probe in due:
        probe.measure(step, row)
    for sink in sinks:
        sink.write(row)


def mean_losses(run: Run) -> dict[str, float]:
    """Return token-weighted mean losses over all processes since the last call (a collective).

    Returns:
        Metric key → mean; what is not finite is NaN.
    """
    state = run.state
    assert state.loss is not None
    sums = {"train/loss": state.loss}
    if state.aux_loss is not None:
        sums["train/aux_loss"] = state.aux_loss
    totals = run.engine.sum(torch.stack(list(sums.values()))).tolist()
    means = {key: total / state.loss_tokens for key, total in zip(sums, totals)}
    state.loss, state.aux_loss, state.loss_tokens = None, None, 0
    return {key: mean if math.isfinite(mean) else math.nan for key, mean in means.items()}


class SpikeGuard:
    """Skips steps whose training loss exceeds its running mean by more than ``max_rise``.

    Such a step is treated like one with a non-finite gradient: all processes skip it, weights and state stay
    untouched, and it is counted. The guard costs one small reduction a step, and the host does not wait.

    Args:
        engine: of the run.
        max_rise: nats per token.
    """

    def __init__(self, engine: Engine, max_rise: float) -> None:
        self._engine, self._max_rise = engine, max_rise
        self._mean = torch.full((), math.inf, dtype=torch.float64, device=engine.device)

    def check(self, loss: torch.Tensor, tokens: int) -> None:
        """Compare the loss of a step with the running mean, after its backward pass (a collective).

        Args:
            loss: this process' loss sum, nats, 0-dim.
            tokens: loss tokens of all processes.
        """
        loss = self._engine.sum(loss.double()) / tokens
        is_spike = loss > self._mean + self._max_rise
        self._engine.force_skip(is_spike)
        # The first finite loss starts the mean; spikes and non-finite losses leave it as it was.
        updated = torch.where(torch.isfinite(self._mean), torch.lerp(loss, self._mean, _MEAN_WEIGHT), loss)
        self._mean = torch.where(is_spike | ~torch.isfinite(loss), self._mean, updated)

    def state(self) -> float | None:
        """Return the running mean, None before the first step. Waits for the device."""
        mean = self._mean.item()
        return mean if math.isfinite(mean) else None

    def restore(self, mean: float | None) -> None:
        """Continue from a running mean that `state` returned."""
        if mean is not None:
            self._mean.fill_(mean)
