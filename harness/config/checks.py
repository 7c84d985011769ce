"""Checks that need more than one key, and the defaults that depend on them. Torch is not imported.

    config = check(load(argv))                    # in the launcher
    config = check(load(argv), worker=True)       # in a process that a launcher started

Checks of the data are in `harness.data`, of the run folder in `harness.record`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from harness.config import (
    data_checks,
    derived_defaults,
    engine_checks,
    launcher,
    memory_estimate,
    model_checks,
    optimizer_checks,
    optimizer_work,
    task_checks,
    value_formats,
)
from harness.config.gpus import Gpu, have_bf16
from harness.config.model_facts import facts
from harness.config.schema import Precision, RunConfig
from harness.errors import InputError
from harness.visible import visible


def check(
    config: RunConfig,
    environ: Mapping[str, str] = os.environ,
    devices: int | Sequence[Gpu] | None = None,
    *,
    worker: bool = False,
    memory: int | None = None,
) -> RunConfig:
    """Check a run and fill in what depends on the machine and on other keys.

    Args:
        config: as composed; checking a checked configuration changes nothing.
        environ: where a launcher's WORLD_SIZE and accelerate's settings are looked for.
        devices: GPUs on each machine that the run will start on, or their number; None: this command starts it on this
            machine.
        worker: this process is one of the run's own: without a launcher's WORLD_SIZE it is the only one.
        memory: bytes of the smallest GPU; None: asked from the driver where the run starts on this machine.

    Returns:
        The configuration with world_size, precision, micro_batch_size, engine.name, learning rate (and its source)
        and every optimizer option set. With epochs, `with_epochs` sets the steps and what follows from them.

    Raises:
        InputError: the first thing that cannot work.
    """
    _check_folders(config)
    task_checks.check(config)
    data_checks.check(config)
    value_formats.duration_seconds("time_limit", config.time_limit)
    shapes = facts(config.model)
    model_checks.check(config, shapes)
    values = config.model_dump()
    values["optimizer"] = optimizer_checks.resolved_section(config, shapes)
    if config.epochs is None:
        _check_schedule(config)
    launcher.check_environment(config, environ)
    gpus = _gpus(environ, devices)
    world_size = _world_size(config, environ, None if devices is None else len(gpus), worker)
    values["world_size"] = world_size
    _refuse_without_gpus(config, gpus)
    values["precision"] = _precision(config, gpus)
    # Engines compare the launcher's precision with the one that is trained in.
    config = config.model_copy(update={"precision": values["precision"]})
    if gpus:
        values["optimizer"] = optimizer_checks.on_cuda(values["optimizer"])
    micro_batch_size = _micro_batch(config, world_size)
    engine = config.engine.name
    if memory is None and devices is None:
        # Only where the run starts: the memory of other machines is unknown.
        memory = launcher.device_memory(environ)
    if memory is not None:
        choice = memory_estimate.choose(config, values["optimizer"], world_size, memory)
        engine, micro_batch_size = choice.engine, choice.micro_batch_size
    values["engine"] = engine_checks.check(config, environ, world_size, engine)
    values["engine"]["optimizer_work"] = optimizer_work.resolved(
        config.engine.optimizer_work,
        values["optimizer"] if values["engine"]["name"] in ("ddp", "zero0") else {},
        (shapes.for_rule(values["optimizer"]).matrices or {}).values(),
        gpus,
        world_size,
    )
    values["micro_batch_size"] = micro_batch_size
    if config.epochs is None:
        values["eval"]["tokens"] = _evaluation_tokens(config)
    return RunConfig.model_validate(values)


def with_epochs(config: RunConfig, examples: int) -> RunConfig:
    """Return a checked configuration that is given in epochs with its steps, and what follows from them.

    Args:
        config: checked, with epochs.
        examples: training samples of one epoch.

    Raises:
        InputError: a schedule longer than the run.
    """
    assert config.epochs is not None
    steps = task_checks.steps_of(config.epochs, examples, config.batch_size)
    config = config.model_copy(update={"steps": steps})
    _check_schedule(config)
    evaluation = config.eval.model_copy(update={"tokens": _evaluation_tokens(config)})
    return config.model_copy(update={"eval": evaluation})


def _evaluation_tokens(config: RunConfig) -> int | Literal["auto"]:
    if config.task.name != "pretrain":
        return "auto"
    tokens = derived_defaults.evaluation_tokens(config)
    if tokens < config.seq_len:
        reason = f"is less than one sequence of seq_len = {config.seq_len} tokens"
        raise InputError("eval.tokens", tokens, reason, fix=f"eval.tokens={config.seq_len}")
    return tokens


def warnings(config: RunConfig) -> list[str]:
    """Return what a user should know about a checked configuration, one line each."""
    found = []
    if config.model.path is not None and config.data.tokenizer == "bpe":
        found.append(
            f"data.tokenizer: {config.model.path} holds no tokenizer, or another one was asked for: one is trained on "
            f"the corpus, and its ids mean something else to the weights; give data.tokenizer=FOLDER"
        )
    memory = launcher.device_memory(os.environ)
    if memory is not None and (line := memory_estimate.warning(config, memory)) is not None:
        found.append(line)
    if config.optimizer.target is not None or config.optimizer.lr_source in (None, "given"):
        return found
    default = optimizer_checks.default_rate(config)
    return found + ([default.warning] if default is not None and default.warning else [])


def _check_folders(config: RunConfig) -> None:
    names = {"group": config.group, "name": config.name}
    if config.name is None:
        names |= {"model.name": config.model.name, "optimizer.name": config.optimizer.name}
    for key, name in names.items():
        if name is not None:
            value_formats.check_folder_name(key, name)
    try:
        os.fsencode(config.runs_dir)
        Path(config.runs_dir).expanduser().exists()
    except (OSError, ValueError, RuntimeError) as error:
        reason = f"is not a path ({getattr(error, 'strerror', None) or error})"
        raise InputError("runs_dir", visible(config.runs_dir)[:300], reason, fix="runs_dir=runs") from None
    place = Path(config.runs_dir).expanduser().absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        reason = f"cannot be written ({place} is {'read-only' if place.is_dir() else 'a file'})"
        raise InputError("runs_dir", config.runs_dir, reason, fix="runs_dir=a folder that you may write to")


def _check_schedule(config: RunConfig) -> None:
    spans = {"warmup": config.schedule.warmup}
    if config.schedule.name == "wsd":
        spans["decay"] = config.schedule.decay
    lengths: dict[str, float] = {}
    for name, span in spans.items():
        key = f"schedule.{name}"
        if span >= 1 and span != int(span):
            allowed = "a share of the run below 1, or a whole number of steps"
            raise InputError(key, span, allowed=allowed, fix=f"{key}={int(span)}")
        lengths[name] = span if span >= 1 else span * config.steps
        if lengths[name] > config.steps:
            reason = f"is longer than the run of steps = {config.steps}"
            raise InputError(key, f"{span:g}", reason, fix=f"{key}=0.1")
    if sum(lengths.values()) > config.steps:
        reason = f"and warmup {config.schedule.warmup:g} together are longer than steps = {config.steps}"
        raise InputError("schedule.decay", config.schedule.decay, reason, fix="schedule.decay=0.2")


def _world_size(config: RunConfig, environ: Mapping[str, str], devices: int | None, worker: bool) -> int:
    launch = launcher.launched(environ)
    wanted = config.world_size
    if launch is None and worker:
        launcher.check_one_process_was_meant(launcher.parent_command_lines())
        launch = launcher.Launch(1, 0, 0)
    if launch is not None and not worker and launch.world_size > 1 and wanted != launch.world_size:
        reason = "in the environment was left by a launcher: this command starts its own processes"
        fix = f"unset {' '.join(launcher.VARIABLES)}"
        raise InputError("WORLD_SIZE", launch.world_size, reason, fix=fix)
    if launch is None:
        present = launcher.visible_devices(environ) if devices is None else devices
        if wanted is not None and devices is None:
            launcher.check_gpus(wanted, present)
        return wanted or present or 1
    if wanted is not None and wanted != launch.world_size:
        variable = f"WORLD_SIZE={launch.world_size}" if "WORLD_SIZE" in environ else "no WORLD_SIZE"
        started = "1 process" if launch.world_size == 1 else f"{launch.world_size} processes"
        reason = f"disagrees with the launcher, which started {started} ({variable})"
        fix = f"world_size={launch.world_size}, or optbench train world_size={wanted} …"
        raise InputError("world_size", wanted, reason, fix=fix)
    return launch.world_size


def _gpus(environ: Mapping[str, str], devices: int | Sequence[Gpu] | None) -> Sequence[Gpu]:
    """Return the GPUs on each machine of the run; where only their number is known they count as recent ones."""
    if devices is None:
        return launcher.visible_gpus(environ)
    return (Gpu(),) * devices if isinstance(devices, int) else devices


def _refuse_without_gpus(config: RunConfig, found: Sequence[Gpu]) -> None:
    """Refuse keys that need a GPU, or one that multiplies TF32, where there is none."""
    # bf16 and TF32 came with the same GPUs.
    if config.tf32 and not (found and have_bf16(found)):
        which = "an older one" if found else "none"
        reason = f"is a number format of GPUs since compute capability 8.0 (A100), and this run has {which}"
        raise InputError("tf32", "true", reason, fix="tf32=false")
    if config.memory_snapshot and not found:
        reason = "is of the memory of GPUs, and this run has none"
        raise InputError("memory_snapshot", "true", reason, fix="memory_snapshot=false")


def _precision(config: RunConfig, found: Sequence[Gpu]) -> Precision:
    """Return the precision to train in, ``auto`` resolved by the GPUs that the run will start on."""
    if config.precision != "auto":
        return config.precision
    return "bf16" if found and have_bf16(found) else "fp32"


def _micro_batch(config: RunConfig, world_size: int) -> int:
    micro = config.micro_batch_size
    unit = world_size * (micro or 1)
    if config.batch_size % unit:
        product = f"world_size × micro_batch_size = {unit}" if micro else f"world_size = {unit}"
        nearest = max(unit, round(config.batch_size / unit) * unit)
        reason = f"is not divisible by {product}"
        raise InputError(
            "batch_size",
            config.batch_size,
            reason,
            allowed=f"multiples of {unit}",
            fix=f"batch_size={nearest}",
        )
    return micro or config.batch_size // world_size
