"""Checks of the engine section: what the engine needs, and which keys it reads. No torch."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Any

from harness.config import deepspeed_config, launcher
from harness.config.schema import PARTITIONED, SHARDED, ZERO, EngineConfig, RunConfig
from harness.config.typed_keys import format_value
from harness.errors import InputError

_OWNERS: dict[str, tuple[str, ...]] = {
    "optimizer_work": ("single", "ddp", "zero0"),
    "shard_axis": SHARDED,
    "replicas": ("hsdp",),
    "check_replicas_every": ("single", "ddp", "zero0", "hsdp"),
    "reshard_after_forward": SHARDED,
    "reduce_every_micro_batch": SHARDED,
    "config_file": ZERO,
}
"""Key of `EngineConfig` → engines that read it; keys that are not here belong to all."""

_NEUTRAL = {"optimizer_work": "replicated"}
"""Key → a value besides its default that says what engines do that do not read it."""

_ELEMENTWISE = (
    "Adadelta",
    "Adagrad",
    "Adam",
    "AdamW",
    "Adamax",
    "ASGD",
    "NAdam",
    "RAdam",
    "RMSprop",
    "Rprop",
    "SGD",
)
"""Optimizers of torch.optim that update every element by itself, so that a flat slice is as good as a matrix."""


def check(
    config: RunConfig, environ: Mapping[str, str], world_size: int, automatic: str = "auto"
) -> dict[str, Any]:
    """Check the engine section and return it resolved: ``auto`` by name, with the DeepSpeed file of the launcher.

    Args:
        config: as composed.
        environ: where a launcher's settings are looked for.
        world_size: processes of the run.
        automatic: what ``auto`` stands for by the memory of the GPUs; "auto": it is unknown.

    Raises:
        InputError: the engine cannot run as asked, or the launcher was asked for something else.
    """
    engine = config.engine
    launcher.check_settings(config, environ)
    name = engine.name
    if name == "auto":
        name = automatic
    if name == "auto":
        name = "single" if world_size == 1 else "ddp"
    if name == "single" and world_size > 1:
        reason = f"is one process, and world_size is {world_size}"
        raise InputError("engine.name", "single", reason, fix="engine=ddp, or world_size=1")
    _check_keys(engine, name)
    _check_replicas(engine, name, world_size)
    _check_reduction(config, name)
    values = engine.model_dump() | {"name": name}
    if name in ZERO:
        values["config_file"] = engine.config_file or launcher.deepspeed_file(environ)
        _check_deepspeed(config, name)
        if values["config_file"] is not None:
            deepspeed_config.user_settings(str(values["config_file"]), int(name[-1]))
    return values


def _check_keys(engine: EngineConfig, name: str) -> None:
    for key, owners in _OWNERS.items():
        value, default = getattr(engine, key), EngineConfig.model_fields[key].default
        if name not in owners and value not in (default, _NEUTRAL.get(key, default)):
            reason = f"has no effect with engine={name}"
            fix = f"engine={owners[-1]}, or engine.{key}={format_value(default)}"
            raise InputError(
                f"engine.{key}", format_value(value), reason, allowed=f"with {', '.join(owners)}", fix=fix
            )


def _check_replicas(engine: EngineConfig, name: str, world_size: int) -> None:
    if name != "hsdp":
        return
    divisors = [str(count) for count in range(1, world_size + 1) if world_size % count == 0]
    if engine.replicas is None or world_size % engine.replicas:
        reason = (
            "is required with engine=hsdp"
            if engine.replicas is None
            else f"does not divide world_size = {world_size}"
        )
        nearest = min(divisors, key=lambda count: abs(int(count) - (engine.replicas or 2)))
        raise InputError(
            "engine.replicas",
            format_value(engine.replicas),
            reason,
            allowed=divisors,
            fix=f"engine.replicas={nearest}",
        )


def reduces_every_micro_batch(config: RunConfig) -> bool:
    """Return True if every micro-batch's gradients are reduced into shards, under `fsdp2` and `hsdp`.

    Args:
        config: with a sharded engine by name.
    """
    asked = config.engine.reduce_every_micro_batch
    return _keeps_fp32_shards(config, config.engine.name) if asked == "auto" else asked


def _keeps_fp32_shards(config: RunConfig, name: str) -> bool:
    # torch 2.13 (`foreach_reduce`) adds reduced gradients up in the dtype of the weights; with a mesh of replicas it
    # adds them up in the reduction's dtype, before the one all-reduce of the step.
    return name == "hsdp" or config.precision != "bf16_pure"


def _check_reduction(config: RunConfig, name: str) -> None:
    if config.engine.reduce_every_micro_batch is True and not _keeps_fp32_shards(config, name):
        reason = "would add the gradients of micro-batches up in bf16 with precision=bf16_pure"
        fix = "engine.reduce_every_micro_batch=auto, or precision=bf16"
        raise InputError("engine.reduce_every_micro_batch", "true", reason, fix=fix)


def _check_deepspeed(config: RunConfig, name: str) -> None:
    if importlib.util.find_spec("deepspeed") is None:
        reason = "needs the package deepspeed, which is not installed"
        raise InputError("engine.name", name, reason, fix='pip install "deepspeed>=0.19", or engine=fsdp2')
    if name not in PARTITIONED:
        return
    if config.precision == "bf16_pure":
        reason = f"is not what {name} does: DeepSpeed keeps fp32 master weights"
        raise InputError("precision", "bf16_pure", reason, fix="precision=bf16, or engine=fsdp2")
    target = config.optimizer.target
    if target is not None and not is_elementwise(target):
        reason = f"gets flat 1-D slices under {name}, on which an optimizer of matrices does something else"
        raise InputError(
            "optimizer.target",
            target,
            reason,
            allowed="torch.optim." + ", ".join(_ELEMENTWISE),
            fix="engine=zero0 or engine=fsdp2",
        )


def is_elementwise(target: str) -> bool:
    """Return True if an import path names an optimizer that is known to update every element by itself."""
    package, _, name = target.rpartition(".")
    return package.startswith("torch.optim") and name in _ELEMENTWISE
