"""The training loop. Everything beside training (evaluation, probes, records) hangs on two small interfaces."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn

from harness.clock import Clock
from harness.config.schema import RunConfig
from harness.engines import Engine
from harness.feed import Feed, MicroBatch
from harness.model import attention_mask, aux_loss_sum, loss_sum, router_coefficient
from harness.probes.flops import FlopCount
from harness.process.heartbeat import Heartbeat
from harness.process.stop import Stop
from harness.record.folder import Row
from harness.schedule import Factor
from harness.spikes import SpikeGuard


class Probe(Protocol):
    """Something measured at some steps. Runs on every process, so it may issue collectives."""

    def due(self, step: int) -> bool:
        """Whether this step needs a row with this probe's keys; the same answer on all processes."""
        ...

    def before_update(self, step: int) -> None:
        """Called right before the optimizer step of a step that is due."""
        ...

    def measure(self, step: int, row: Row) -> None:
        """Add keys to the row of a step that is due."""
        ...

    def state(self) -> dict[str, Any]:
        """What it must know to go on in another process: JSON."""
        ...

    def restore(self, state: dict[str, Any], steps: int) -> str | None:
        """Go on from what `state` gave after ``steps`` steps; returns what of its own files is lost, one line."""
        ...


class Keeper(Protocol):
    """Who keeps checkpoints. Runs on every process, which call each method at the same points."""

    @property
    def is_wanted(self) -> bool:
        """Whether this process wants a checkpoint now. Does not block."""
        ...

    @property
    def is_writing(self) -> bool:
        """Whether this process is still writing one. Does not block."""
        ...

    def before_step(self) -> None:
        """Called before a step draws random numbers."""
        ...

    def after_step(self, *, wanted: bool, writing: bool) -> None:
        """Called after a step, with what any process said of the two properties, up to two steps ago."""
        ...

    @property
    def problem(self) -> str:
        """Why the last step is not on the disk, one line; empty where it is, or where nobody asked for it."""
        ...

    def stop(self) -> None:
        """Called where the run is asked to stop before its end: nothing that was done may be lost."""
        ...

    def finish(self) -> None:
        """Called after the last step, also that of a run that diverged."""
        ...


class NoKeeper:
    """Keeps nothing."""

    is_wanted = False
    is_writing = False
    problem = ""

    def before_step(self) -> None:
        """Nothing."""

    def after_step(self, *, wanted: bool, writing: bool) -> None:
        """Nothing."""

    def stop(self) -> None:
        """Nothing."""

    def finish(self) -> None:
        """Nothing."""


class StepObserver(Protocol):
    """Something that follows the steps of this process from outside, e.g. a profiler."""

    @property
    def problem(self) -> str:
        """Why what it promised is not there, one line; empty where it is."""
        ...

    def step(self) -> None:
        """Called after every step. Issues no collectives."""
        ...


class Sink(Protocol):
    """Somewhere that rows go. Runs on rank 0 alone."""

    def write(self, row: Row) -> None:
        """Take one row. Must not raise for reasons outside of this machine."""
        ...


@dataclass
class Ledger:
    """Host-side running totals."""

    step: int = 0
    """Steps done."""
    tokens: int = 0
    wall_s: float = 0.0
    skipped: int = 0
    stop: bool = False
    wanted: bool = False
    """A checkpoint was wanted, at the last vote that was read."""
    writing: bool = False
    """One was being written, at that vote."""
    loss: torch.Tensor | None = None
    """Loss sums of this process since the last row, in nats."""
    aux_loss: torch.Tensor | None = None
    """The same for the routers' load-balancing loss; None: the model has none."""
    loss_tokens: int = 0
    """Tokens of all processes since the last row."""
    grad_norm: torch.Tensor | None = None
    pending: Callable[[], list[float]] | None = None
    """Vote of the last step: read one step late, so that the host never waits for the device."""


@dataclass(frozen=True)
class Whole:
    """What was counted on the model before an engine cut it."""

    parameters: int
    """Trainable ones, tied ones once."""
    ownership: list[dict[str, Any]]
    """Which parameter takes which rule (`harness.optimizer.ownership`)."""
    flops: FlopCount


@dataclass
class Run:
    """All that a run consists of, as `harness.run.assemble` puts it together."""

    config: RunConfig
    engine: Engine
    model: nn.Module
    whole: Whole
    optimizer: torch.optim.Optimizer
    factor: Factor
    feed: Feed
    clock: Clock
    stop: Stop
    probes: Sequence[Probe] = ()
    sinks: Sequence[Sink] = ()
    checkpoints: Keeper = field(default_factory=NoKeeper)
    heartbeat: Heartbeat | None = None
    spikes: SpikeGuard | None = None
    observer: StepObserver | None = None
    folder: Path | None = None
    """The run folder, where this process is the one that writes it."""
    ledger: Ledger = field(default_factory=Ledger)


def train(run: Run) -> str:
    """Train to the end, to a stop signal or to divergence; returns the state to record (`record.schema.STATES`)."""
    config, engine, clock, ledger, checkpoints = (
        run.config,
        run.engine,
        run.clock,
        run.ledger,
        run.checkpoints,
    )
    if ledger.step == 0:
        # Since the clock was made the run folder was opened and W&B was started.
        clock.read()
    for step in range(ledger.step, config.steps):
        if run.heartbeat is not None:
            run.heartbeat.step = step + 1
        due = [probe for probe in run.probes if probe.due(step)]
        checkpoints.before_step()
        with clock.part("data"):
            micro_batches = run.feed.step(step)
            tokens = run.feed.loss_tokens(step)
        with clock.part("forward_backward"):
            # Not right after the update: a row in between counts the gradients' bytes.
            run.optimizer.zero_grad(set_to_none=True)
            loss, aux_loss = forward_backward(run, micro_batches, weight=engine.world_size / tokens)
        with clock.part("optimizer"):
            settle(run)
            if ledger.stop or ledger.skipped > config.max_skipped_steps:
                break
            for probe in due:
                probe.before_update(step)
            set_lr(run.optimizer, run.factor(step))
            if run.spikes is not None:
                run.spikes.check(loss, tokens)
            ledger.grad_norm, nonfinite = engine.step(config.max_grad_norm)
            said = (run.stop.requested, checkpoints.is_wanted, checkpoints.is_writing)
            ledger.pending = engine.vote(
                torch.stack([nonfinite, *(torch.full_like(nonfinite, word) for word in said)])
            )
        ledger.loss = loss if ledger.loss is None else ledger.loss + loss
        if aux_loss is not None:
            ledger.aux_loss = aux_loss if ledger.aux_loss is None else ledger.aux_loss + aux_loss
        ledger.loss_tokens += tokens
        ledger.tokens += tokens
        ledger.step = step + 1
        if due:
            write_row(run, step, due)
        checkpoints.after_step(wanted=ledger.wanted, writing=ledger.writing)
        if run.observer is not None:
            run.observer.step()
    settle(run)
    is_diverged = ledger.skipped > config.max_skipped_steps
    if ledger.step < config.steps and not is_diverged:
        checkpoints.stop()
        return "interrupted"
    checkpoints.finish()
    if is_diverged:
        return "diverged"
    # A finished run promises its weights: without them the same command has to be able to go on.
    return "failed" if checkpoints.problem else "finished"


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

    ``weight`` is world_size over the loss tokens of the *global* batch. The engine averages gradients over
    processes, so what comes out is the mean over all tokens of the step, however it was cut. The routers' loss of a
    micro-batch is weighted with the micro-batch's tokens (`harness.model.loss`).
    """
    coefficient = router_coefficient(run.model)
    is_padded = run.config.data.mode == "padded"
    total = torch.zeros((), device=run.engine.device)
    aux_total = torch.zeros_like(total) if coefficient else None
    for index, (ids, labels) in enumerate(micro_batches):
        # Causal attention never looks at padding on the right; the routers' loss would count it.
        mask = {"attention_mask": attention_mask(labels)} if coefficient and is_padded else {}
        with run.engine.micro_step(last=index == len(micro_batches) - 1):
            with run.clock.part("forward"), run.engine.autocast():
                outputs = run.engine.model(input_ids=ids, **mask)
            loss = objective = loss_sum(outputs.logits, labels)
            if aux_total is not None:
                aux_loss = aux_loss_sum(outputs, labels)
                objective = loss + coefficient * aux_loss
                aux_total += aux_loss.detach()
            run.engine.backward(objective * weight)
        total += loss.detach()
    return LossSums(total, aux_total)


def settle(run: Run) -> None:
    """Read the last step's vote, if there is one, and let the host catch up with what it says."""
    if run.ledger.pending is None:
        return
    nonfinite, stop, wanted, writing = run.ledger.pending()
    run.ledger.pending = None
    if nonfinite:
        run.ledger.skipped += 1
        run.engine.retract_step()
    run.ledger.stop, run.ledger.wanted, run.ledger.writing = bool(stop), bool(wanted), bool(writing)


def set_lr(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Scale each group's peak learning rate, except in groups with ``scheduled=False``."""
    for group in optimizer.param_groups:
        if group.get("scheduled", True):
            group["lr"] = group.setdefault("initial_lr", group["lr"]) * factor


def write_row(run: Run, step: int, due: Sequence[Probe]) -> None:
    """Measure what is due and hand the row to the sinks: the one place where the host waits for the device."""
    ledger = run.ledger
    settle(run)
    row: Row = {"step": ledger.step, "tokens": ledger.tokens}
    for probe in due:
        probe.measure(step, row)
    for sink in run.sinks:
        sink.write(row)


def mean_losses(run: Run) -> dict[str, float]:
    """Return token-weighted means over all processes since this was last asked, and start anew (a collective).

    Returns:
        metric key → mean; what is not finite is NaN.
    """
    ledger = run.ledger
    assert ledger.loss is not None
    sums = {"train/loss": ledger.loss}
    if ledger.aux_loss is not None:
        sums["train/aux_loss"] = ledger.aux_loss
    totals = run.engine.sum(torch.stack(list(sums.values()))).tolist()
    means = {key: total / ledger.loss_tokens for key, total in zip(sums, totals)}
    ledger.loss, ledger.aux_loss, ledger.loss_tokens = None, None, 0
    return {key: mean if math.isfinite(mean) else math.nan for key, mean in means.items()}
