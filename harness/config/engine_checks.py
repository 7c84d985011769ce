"""Checks of the engine: what it needs, which keys are its own, and what else the launcher was told. No torch."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Any, get_args

from harness.config import deepspeed_config
from harness.config.schema import EngineConfig, Precision, RunConfig
from harness.config.typed_keys import format_value
from harness.errors import InputError

ZERO = ("zero0", "zero1", "zero2", "zero3")
PARTITIONED = ("zero1", "zero2", "zero3")
"""Engines whose optimizer sees flat slices of the parameters."""
SHARDED = ("fsdp2", "hsdp")

_OWNERS: dict[str, tuple[str, ...]] = {
    "optimizer_work": ("single", "ddp", "zero0"),
    "shard_axis": SHARDED,
    "replicas": ("hsdp",),
    "reshard_after_forward": SHARDED,
    "config_file": ZERO,
}
"""Key of `EngineConfig` → engines that read it; keys that are not here belong to all."""

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

_TRUE = ("1", "true", "yes")


def check(config: RunConfig, environ: Mapping[str, str], world_size: int) -> dict[str, Any]:
    """The engine section, resolved: ``auto`` by name, the DeepSpeed file that the launcher named.

    Args:
        config: as composed.
        environ: where a launcher's settings are looked for.
        world_size: processes of the run.

    Raises:
        InputError: the engine cannot run as asked, or the launcher was asked for something else.
    """
    engine = config.engine
    _check_launcher(config, environ)
    name = engine.name
    if name == "auto":
        name = "single" if world_size == 1 else "ddp"
    if name == "single" and world_size > 1:
        reason = f"is one process, and world_size is {world_size}"
        raise InputError("engine.name", "single", reason, fix="engine=ddp, or world_size=1")
    _check_keys(engine, name)
    _check_replicas(engine, name, world_size)
    values = engine.model_dump() | {"name": name}
    if name in ZERO:
        values["config_file"] = engine.config_file or _launchers_file(environ)
        _check_deepspeed(config, name)
        if values["config_file"] is not None:
            deepspeed_config.user_settings(str(values["config_file"]), int(name[-1]))
    return values


def _check_keys(engine: EngineConfig, name: str) -> None:
    for key, owners in _OWNERS.items():
        value, default = getattr(engine, key), EngineConfig.model_fields[key].default
        if name not in owners and value != default:
            reason = f"means nothing to engine {name}"
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
            "must be told to hsdp"
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
    """Whether an import path names an optimizer that is known to update every element by itself."""
    package, _, name = target.rpartition(".")
    return package.startswith("torch.optim") and name in _ELEMENTWISE


def _check_launcher(config: RunConfig, environ: Mapping[str, str]) -> None:
    name = config.engine.name
    for variable, engines, what in (
        ("ACCELERATE_USE_DEEPSPEED", ZERO, "DeepSpeed"),
        ("ACCELERATE_USE_FSDP", SHARDED, "FSDP"),
    ):
        if _is_set(environ, variable) and name not in engines:
            fix = f"unset {variable}, or engine={engines[0] if what == 'FSDP' else 'zero2'}"
            reason = f"disagrees with the launcher, which asks for {what} ({variable}={environ[variable]})"
            raise InputError("engine.name", name, reason, fix=fix)
    if _is_set(environ, "ACCELERATE_USE_DEEPSPEED"):
        _check_launchers_deepspeed(config, environ)
    if _is_set(environ, "ACCELERATE_USE_FSDP"):
        _check_launchers_fsdp(config, environ)
    variable = "ACCELERATE_MIXED_PRECISION"
    mixed = environ.get(variable, "no") or "no"
    if mixed not in ("no", config.precision):
        what = f"was given --mixed_precision {mixed}"
        fix = f"precision={mixed}" if mixed in get_args(Precision) else "--mixed_precision no"
        _refuse_launcher("precision", config.precision, what, fix, variable)


def _check_launchers_fsdp(config: RunConfig, environ: Mapping[str, str]) -> None:
    name = config.engine.name
    if environ.get("FSDP_VERSION", "2") != "2":
        _refuse_launcher("engine.name", name, "asks for FSDP 1", "--fsdp_version 2", "FSDP_VERSION")
    if _is_set(environ, variable := "FSDP_OFFLOAD_PARAMS"):
        fix = "--fsdp_offload_params false"
        _refuse_launcher("engine.name", name, "asks for parameters in host memory", fix, variable)
    switches = {
        "FSDP_RESHARD_AFTER_FORWARD": ("engine.reshard_after_forward", config.engine.reshard_after_forward),
        "FSDP_ACTIVATION_CHECKPOINTING": (
            "model.activation_checkpointing",
            config.model.activation_checkpointing,
        ),
    }
    for variable, (key, ours) in switches.items():
        wanted = environ.get(variable, "").lower()
        # Without its flag the launcher says false for checkpointing: only true is a wish.
        is_wish = wanted == "true" or (wanted == "false" and "RESHARD" in variable)
        if is_wish and wanted != format_value(ours):
            _refuse_launcher(key, format_value(ours), f"was given {wanted}", f"{key}={wanted}", variable)


def _check_launchers_deepspeed(config: RunConfig, environ: Mapping[str, str]) -> None:
    name = config.engine.name
    stage = environ.get(variable := "ACCELERATE_DEEPSPEED_ZERO_STAGE", "")
    file, ours = _launchers_file(environ), config.engine.config_file
    # Without --zero_stage the launcher says 2, also beside a file with another stage in it.
    if file is None and stage in ("0", "1", "2", "3") and f"zero{stage}" != name:
        _refuse_launcher("engine.name", name, f"asks for ZeRO stage {stage}", f"engine=zero{stage}", variable)
    if file is not None and ours is not None and file != ours:
        variable = "ACCELERATE_DEEPSPEED_CONFIG_FILE"
        _refuse_launcher("engine.config_file", ours, f"was given {file}", "name one of them", variable)
    for part in ("OPTIMIZER", "PARAM"):
        variable = f"ACCELERATE_DEEPSPEED_OFFLOAD_{part}_DEVICE"
        if environ.get(variable, "none") not in ("none", ""):
            flag = f"--offload_{part.lower()}_device"
            what = f"asks for {flag}, which is not supported"
            _refuse_launcher("engine.name", name, what, f"{flag} none", variable)
    clipping = environ.get(variable := "ACCELERATE_GRADIENT_CLIPPING", "none")
    if clipping not in ("none", "") and clipping != format_value(config.max_grad_norm):
        fix = f"max_grad_norm={clipping}"
        _refuse_launcher(
            "max_grad_norm", format_value(config.max_grad_norm), f"clips at {clipping}", fix, variable
        )


def _launchers_file(environ: Mapping[str, str]) -> str | None:
    file = environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    return None if not _is_set(environ, "ACCELERATE_USE_DEEPSPEED") or file.lower() in ("none", "") else file


def _refuse_launcher(key: str, value: object, what: str, fix: str, variable: str) -> None:
    """Refuse what a launcher asked for, or what the environment still holds of a launcher that was here before."""
    reason = f"disagrees with the launcher, which {what}"
    raise InputError(key, value, reason, fix=f"{fix}; without a launcher: unset {variable}")


def _is_set(environ: Mapping[str, str], variable: str) -> bool:
    return environ.get(variable, "").lower() in _TRUE
