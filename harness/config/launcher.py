"""What a launcher and the environment say: processes, devices, and settings that contradict the keys of a run.

Torch, Accelerate and DeepSpeed read environment variables that would change a run without any key saying so. They are
refused here. Torch is not imported.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, get_args

import psutil
import yaml

from harness.config import gpus
from harness.config.gpus import Gpu
from harness.config.schema import SHARDED, ZERO, Precision, RunConfig
from harness.config.typed_keys import format_value
from harness.errors import InputError

_MULTI = (
    "ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes {n} --num_machines 1 "
    "--gpu_ids all --mixed_precision no --dynamo_backend no -m harness.train world_size={n} …"
)
_PROGRAMS = (
    "accelerate",
    "accelerate-launch",
    "accelerate.commands.launch",
    "accelerate.commands.accelerate_cli",
)


VARIABLES = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
"""What a launcher tells each process."""


class Launch(NamedTuple):
    """What a launcher says about this process."""

    world_size: int
    rank: int
    local_rank: int


def launched(environ: Mapping[str, str]) -> Launch | None:
    """Return the launcher's WORLD_SIZE, RANK and LOCAL_RANK; None without a launcher.

    Raises:
        InputError: they are not numbers, contradict each other, or are only half there.
    """
    numbers: dict[str, int] = {}
    for name in VARIABLES:
        text = environ.get(name)
        if text is None:
            continue
        if not text.isdecimal() or len(text) > 9:
            raise InputError(name, text, "in the environment is not a number", fix=f"unset {name}")
        numbers[name] = int(text)
    unset = f"unset {' '.join(name for name in VARIABLES if name in environ)}"
    world = numbers.get("WORLD_SIZE")
    if world is None:
        for name in ("RANK", "LOCAL_RANK"):
            if numbers.get(name, 0) > 0:
                reason = "in the environment is one of several processes, and WORLD_SIZE is not set"
                raise InputError(name, numbers[name], reason, fix=f"{unset}, or export WORLD_SIZE")
        return None
    if world > 1 and "RANK" not in numbers:
        reason = "in the environment is without RANK, so that every process would be the first one"
        raise InputError("WORLD_SIZE", world, reason, fix=f"{unset}, or start the processes with a launcher")
    launch = Launch(world, numbers.get("RANK", 0), numbers.get("LOCAL_RANK", 0))
    local = numbers.get("LOCAL_WORLD_SIZE", launch.world_size)
    is_consistent = launch.rank < world and launch.local_rank < local <= world
    if not is_consistent:
        given = " ".join(f"{name}={value}" for name, value in numbers.items())
        raise InputError("launcher", given, "contradict each other", fix=unset)
    return launch


def cpu_is_requested(environ: Mapping[str, str] = os.environ) -> bool:
    """Return True if ACCELERATE_USE_CPU asks for training on the CPU."""
    return environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")


def visible_gpus(environ: Mapping[str, str] = os.environ) -> Sequence[Gpu]:
    """Return the NVIDIA GPUs that this process may use, by the driver, CUDA_VISIBLE_DEVICES and ACCELERATE_USE_CPU.

    Numbers in CUDA_VISIBLE_DEVICES choose by the driver's order, which is that of the slots. Of a MIG slice neither
    memory nor name is known: the driver's are those of the whole GPU.
    """
    if cpu_is_requested(environ):
        return ()
    present = gpus.present()
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return present
    names = [name.strip() for name in visible.split(",")]
    # CUDA stops reading at the first invalid entry.
    valid = next((place for place, name in enumerate(names) if name in ("", "-1")), len(names))
    chosen = names[: min(valid, len(present))]
    if all(name.isdecimal() and int(name) < len(present) for name in chosen):
        return [present[int(name)] for name in chosen]
    return [
        gpu._replace(name="", memory_bytes=None) if name.startswith("MIG-") else gpu
        for name, gpu in zip(chosen, present, strict=False)
    ]


def visible_devices(environ: Mapping[str, str] = os.environ) -> int:
    """Return the number of `visible_gpus`."""
    return len(visible_gpus(environ))


def device_memory(environ: Mapping[str, str] = os.environ) -> int | None:
    """Return the bytes of the smallest of `visible_gpus`; None if there is none, or one does not tell."""
    sizes = [gpu.memory_bytes for gpu in visible_gpus(environ)]
    known = [size for size in sizes if size is not None]
    return min(known) if known and len(known) == len(sizes) else None


def check_gpus(processes: int, visible: int) -> None:
    """Refuse more processes on a machine than it has GPUs; without GPUs they share the CPU.

    NCCL would end them with "Duplicate GPU detected", after everything was built.

    Args:
        processes: of the run on this machine.
        visible: GPUs that they may use.

    Raises:
        InputError: there are GPUs, and fewer than processes.
    """
    if not 0 < visible < processes:
        return
    reason = f"is the number of processes on this machine, which shows them {visible} GPU(s)"
    if visible == 1:
        reason += (
            "; CUDA_VISIBLE_DEVICES must name the GPUs of all processes in each (not srun --gpus-per-task=1)"
        )
    raise InputError(
        "world_size",
        processes,
        f"{reason}: one process needs one GPU",
        allowed=f"at most {visible} processes a machine",
        fix=f"world_size={visible}, CUDA_VISIBLE_DEVICES with {processes} GPUs in every process, "
        "or ACCELERATE_USE_CPU=true",
    )


def parent_command_lines(levels: int = 2) -> list[list[str]]:
    """Return the command lines of the processes above this one, nearest first, as far as they can be read."""
    lines: list[list[str]] = []
    try:
        for process in psutil.Process().parents()[:levels]:
            lines.append(process.cmdline())
    except psutil.Error:
        pass
    return lines


def requested_processes(command: Sequence[str]) -> int | None:
    """Return the processes that an `accelerate launch` command asks for; None for another program or no number."""
    names = [Path(argument).name for argument in command]
    program = next((place for place, name in enumerate(names) if name in _PROGRAMS), None)
    if program is None:
        return None
    arguments = list(command[program + 1 :])
    number = _flag(arguments, "num_processes")
    if number is None and (file := _flag(arguments, "config_file")) is not None:
        try:
            content = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError):
            return None
        number = str(content.get("num_processes", "")) if isinstance(content, dict) else None
    return int(number) if number and number.isdecimal() else None


def check_one_process_was_meant(commands: Sequence[Sequence[str]]) -> None:
    """Refuse `accelerate launch --cpu --num_processes 2`, which silently starts one process.

    Args:
        commands: command lines of the processes above, nearest first.

    Raises:
        InputError: the launcher was asked for several processes and started this one alone.
    """
    for command in commands:
        wanted = requested_processes(command)
        if wanted is not None and wanted > 1:
            raise InputError(
                "--num_processes",
                wanted,
                "was asked of accelerate launch, which started one process, as its --cpu always does",
                fix=f"optbench train world_size={wanted} …, or {_MULTI.format(n=wanted)}",
            )


def _flag(arguments: Sequence[str], name: str) -> str | None:
    spellings = (f"--{name}", f"--{name.replace('_', '-')}")
    for place, argument in enumerate(arguments):
        flag, equals, value = argument.partition("=")
        if flag in spellings:
            return value if equals else (arguments[place + 1] if place + 1 < len(arguments) else None)
    return None


_ON = ("1", "true", "yes", "y", "on", "t")

_REFUSED_SWITCHES = {
    "ACCELERATE_USE_MEGATRON_LM": "asks for Megatron-LM, which is not supported",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "asks for tensor or context parallelism, which is not supported",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "computes fp32 products in TF32 (three digits)",
}
"""Switch → what it does when it is on."""


def check_environment(config: RunConfig, environ: Mapping[str, str]) -> None:
    """Refuse variables that change what is trained and that no key of the run names.

    Args:
        config: as composed.
        environ: of this process.

    Raises:
        InputError: the first such variable; the fix unsets it.
    """
    for variable, effect in _REFUSED_SWITCHES.items():
        if environ.get(variable, "").lower() in _ON:
            _refuse_variable(variable, environ, effect)
    backend = environ.get("ACCELERATE_DYNAMO_BACKEND", "no")
    if backend.lower() not in ("no", "none", ""):
        _refuse_variable("ACCELERATE_DYNAMO_BACKEND", environ, "compiles the model", "model.compile=true")
    if config.model.compile:
        for variable in ("TORCH_COMPILE_DISABLE", "TORCHDYNAMO_DISABLE"):
            if environ.get(variable, "").lower() in _ON:
                _refuse_variable(variable, environ, "turns model.compile=true off", "model.compile=false")
    accumulated = environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    if accumulated.isdecimal() and accumulated != "1":
        effect = "asks for micro-batches that batch_size and micro_batch_size decide here"
        _refuse_variable("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", environ, effect)
    if environ.get(variable := "ACCELERATE_TORCH_DEVICE", ""):
        _refuse_variable(variable, environ, "puts every process on one device", "CUDA_VISIBLE_DEVICES")
    if environ.get("NVIDIA_TF32_OVERRIDE", "") == "1":
        _refuse_variable("NVIDIA_TF32_OVERRIDE", environ, "computes fp32 products in TF32 (three digits)")


def _refuse_variable(
    variable: str, environ: Mapping[str, str], effect: str, instead: str | None = None
) -> None:
    fix = f"unset {variable}" + (f", with {instead} in its place if it is meant" if instead else "")
    raise InputError(variable, environ[variable], f"in the environment {effect}", fix=fix)


_TRUE = ("1", "true", "yes")
"""Values with which a launcher sets a variable; what a user may export by hand (`_ON`) is wider."""


def check_settings(config: RunConfig, environ: Mapping[str, str]) -> None:
    """Refuse settings of the launcher (engine, precision, clipping, files) that contradict the keys of the run.

    Raises:
        InputError: the first contradiction.
    """
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
            config.model.activation_checkpointing != "none",
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
    file, ours = deepspeed_file(environ), config.engine.config_file
    # Without --zero_stage the launcher says 2, even with a file that has another stage.
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


def deepspeed_file(environ: Mapping[str, str]) -> str | None:
    """Return the DeepSpeed file that the launcher names; None if there is none."""
    file = environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    return None if not _is_set(environ, "ACCELERATE_USE_DEEPSPEED") or file.lower() in ("none", "") else file


def _refuse_launcher(key: str, value: object, what: str, fix: str, variable: str) -> None:
    """Refuse what a launcher asked for, or what the environment still holds of a launcher that was here before."""
    reason = f"disagrees with the launcher, which {what}"
    raise InputError(key, value, reason, fix=f"{fix}; without a launcher: unset {variable}")


def _is_set(environ: Mapping[str, str], variable: str) -> bool:
    return environ.get(variable, "").lower() in _TRUE
