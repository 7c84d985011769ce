"""One run from its parts to its record."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from harness import engines, gpu_facts, model, schedule
from harness.checkpoint import resuming
from harness.checkpoint.saving import Checkpoints
from harness.checkpoint.store import Store
from harness.config import value_formats
from harness.data.micro_batches import MicroBatchLoader
from harness.loop import Callbacks, ModelInfo, Run, SpikeGuard, train
from harness.memory_phases import MemoryPhases
from harness.memory_snapshot import snapshot_when_out
from harness.model.attention_logits import AttentionLogits
from harness.optimizer import build_optimizer, ownership, shard_axes
from harness.preparation import Prepared
from harness.probes.flops import FlopCount
from harness.probes.moments import Moments
from harness.probes.replicas import ReplicaCheck
from harness.probes.throughput import Balance, Progress
from harness.process.gpu_environment import FLIGHT_RECORDER
from harness.process.heartbeat import Heartbeat
from harness.process.stop import Stop
from harness.profiling import Clock
from harness.protocols import Engine, Probe
from harness.recorder import RunRecorder, recording
from harness.tasks import task_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from harness.tasks.task import TaskData


def execute(prepared: Prepared) -> str:
    """Train as prepared and return the state in which the run ended. All processes call it.

    Raises:
        InputError: what only shows once the model exists; nothing was trained.
    """
    engine = engines.start(prepared.config)
    with snapshot_when_out(prepared.folder, engine.rank, enabled=prepared.config.memory_snapshot):
        state = _execute(prepared, engine)
    # Not after an exception: the other processes are elsewhere then, and waiting for them would hide it.
    engine.close()
    return state


def _execute(prepared: Prepared, engine: Engine) -> str:
    run = assemble(prepared, engine)
    heartbeat = Heartbeat(prepared.folder, engine.rank)
    if engine.rank == 0:
        with recording(prepared, run) as recorder:
            state = _train_recorded(prepared, run, recorder, heartbeat)
    else:
        probes = build_probes(run, prepared.data)
        choice, checkpoints = _choose(prepared, run, probes, heartbeat, attempt=0, say=_to_stderr)
        resuming.resume(run, probes, checkpoints.store, choice, lambda line: None)
        state = train(run, Callbacks(probes, checkpoints=checkpoints, heartbeat=heartbeat))
    run.loader.close()
    heartbeat.stop()
    return state


def assemble(prepared: Prepared, engine: Engine) -> Run:
    """Build model, optimizer and data of a run on an engine."""
    config, data, task = prepared.config, prepared.data, task_of(prepared.config)
    assert config.micro_batch_size is not None
    memory = MemoryPhases(engine.device)
    head = task.head(config, data)
    told: list[str] = []
    network, weights = model.build_deferred(
        config.model,
        seed=config.seed,
        precision=config.precision,
        trust_remote_code=config.trust_remote_code,
        head=head,
        say=told.append,
    )
    if head is None and engine.world_size == 1:
        # That a language model of one process is built whole is no news.
        told.clear()
    notes = model.specialize(
        network,
        # A classifier has no logits of a vocabulary.
        config.model if head is None else config.model.model_copy(update={"loss_chunk": None}),
        seq_len=config.seq_len,
        tokens=config.micro_batch_size * config.seq_len,
        clip_threshold=config.optimizer.options.get("qk_clip_threshold"),
    )
    # From here on the processes draw different numbers (dropout): their rows are different, too.
    torch.manual_seed(config.seed * 1_000_003 + engine.rank + 1)
    # Counted before an engine cuts the model, which has no memory yet.
    parameters = model.count_parameters(network)
    flops = FlopCount.of(
        network,
        seq_len=task.context_length(config, data),
        precision=config.precision,
        device=engine.device,
        peak_flops=config.peak_flops,
    )
    if config.model.compile:
        model.compile_layers(network)
    axes = shard_axes(config, network, engine.shards) if engine.layout == "sharded" else {}
    engine.shard(network, axes, model.decoder_layers(network), weights)
    # After sharding: an optimizer recognizes DTensors and plans its layout by them.
    optimizer = build_optimizer(config, network, engine)
    info = ModelInfo(parameters, ownership(optimizer, network), flops.per_token, flops.peak, (*told, *notes))
    engine.prepare(network, optimizer)
    loader = MicroBatchLoader(
        task.samples(config, data),
        batch_size=config.batch_size,
        micro_batch_size=config.micro_batch_size,
        rank=engine.rank,
        world_size=engine.world_size,
        device=engine.device,
        steps=config.steps,
    )
    devices = gpu_facts.of_all_processes(engine.device, engine.world_size)
    stop = Stop(value_formats.duration_seconds("time_limit", config.time_limit))
    stop.install()
    return Run(
        config,
        engine,
        network,
        info,
        optimizer,
        objective=task.objective(config, network),
        lr_factor=schedule.factor(config.schedule, config.steps),
        loader=loader,
        clock=Clock(engine.device),
        memory=memory,
        stop=stop,
        devices=devices,
        attention_logits=(
            None
            if config.optimizer.options.get("qk_clip_threshold") is None
            else AttentionLogits(network, engine.device)
        ),
        spikes=None if config.max_loss_rise is None else SpikeGuard(engine, config.max_loss_rise),
    )


def build_probes(run: Run, data: TaskData, folder: Path | None = None) -> list[Probe]:
    """Build the probes of a run, in the order in which they measure.

    Args:
        run: assembled.
        data: that it trains on.
        folder: the run folder where this process is the one that writes it, else None.
    """
    probes: list[Probe] = [
        task_of(run.config).evaluation(run, data, folder),
        Moments(run, folder),
        Balance(run),
        ReplicaCheck(run),
    ]
    # Last: its row holds what the others cost, and it is due whenever one of them is.
    return [*probes, Progress(run, probes)]


def _train_recorded(prepared: Prepared, run: Run, recorder: RunRecorder, heartbeat: Heartbeat) -> str:
    """Train on rank 0, which keeps the record."""
    probes = build_probes(run, prepared.data, recorder.folder.path)
    choice, checkpoints = _choose(
        prepared, run, probes, heartbeat, attempt=recorder.folder.attempt, say=recorder.log.say
    )
    recorder.announce()
    first_step = resuming.resume(run, probes, checkpoints.store, choice, recorder.log.say)
    return recorder.record(
        first_step,
        checkpoints,
        lambda sinks, profile: train(run, Callbacks(probes, sinks, checkpoints, heartbeat, profile)),
    )


def _choose(
    prepared: Prepared,
    run: Run,
    probes: list[Probe],
    heartbeat: Heartbeat,
    *,
    attempt: int,
    say: Callable[[str], None],
) -> tuple[resuming.Choice, Checkpoints]:
    """Choose the checkpoint to continue from, and make what will write the next ones (a collective)."""
    # Only now: building the model may take longer on one process than on another.
    run.engine.set_collective_timeout()
    store = Store(prepared.folder)
    if run.engine.rank == 0:
        store.discard_partial()
    choice = resuming.choose(
        run, store, identity=prepared.identity, attempt=attempt, shorter_runs=prepared.shorter_runs
    )
    if run.engine.rank == 0:
        store.archive(choice.attempt - 1, after=-1 if choice.step is None else choice.step)
    # Only now: rank 0 has opened the folder, which must be its own, or empty, until then.
    heartbeat.start()
    if run.engine.device.type == "cuda" and run.engine.world_size > 1:
        (prepared.folder / FLIGHT_RECORDER).mkdir(exist_ok=True)
    checkpoints = Checkpoints(
        run,
        prepared.folder,
        prepared.hashes(),
        attempt=choice.attempt,
        say=say,
        probes=probes,
        saved_step=choice.step,
    )
    return choice, checkpoints


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
