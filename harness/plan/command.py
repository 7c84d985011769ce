"""`optbench plan [key=value …] [--world-size N] [--device NAME] [--memory SIZE] [--json]`: what a run needs."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from harness import command_line
from harness.config import checks, compose, memory_estimate, model_checks
from harness.config.gpus import Gpu
from harness.config.launcher import device_memory, visible_gpus
from harness.config.schema import RunConfig
from harness.device_specs import DEVICES, device_spec
from harness.errors import InputError, closest
from harness.output import json_document

DEVICE_MEMORY = "80GB"
"""Device memory that `fits` is checked against by default: an A100 or H100."""
NETWORK = "50GB"
"""Bandwidth of each GPU between nodes by default: one adapter of 400 Gbit/s."""
_UNITS = {
    "": 10**9,
    "gb": 10**9,
    "g": 10**9,
    "gib": 2**30,
    "mb": 10**6,
    "mib": 2**20,
    "tb": 10**12,
    "tib": 2**40,
}


class _Request(NamedTuple):
    overrides: list[str]
    world_size: int | None
    device: str | None
    device_memory: int
    network: int
    is_elsewhere: bool
    as_json: bool


def main(argv: Sequence[str]) -> int:
    """Print the plan of the worst rank; exit code 0.

    Raises:
        InputError: bad input.
    """
    request = _parse(argv)
    config = compose.load(_with_world_size(request.overrides, request.world_size))
    if request.is_elsewhere:
        gpu = _gpu(request.device, request.device_memory)
        config = _on_gpus(config, (gpu,) * (config.world_size or 1), request.device_memory)
    else:
        config = _on_gpus(config, visible_gpus(), device_memory())
    say = _progress()
    say("starting torch")
    # Only now: `optbench plan --help` and bad input need no torch.
    from harness.plan.estimate import plan

    estimates = plan(config, request.device_memory, say, device=request.device, network=request.network)
    if request.as_json:
        print(json_document(**estimates))
    else:
        _show(config, estimates)
    return 0


def _gpu(device: str | None, memory: int) -> Gpu:
    """Return what the driver of a device would say; without a name it is a recent one."""
    spec = None if device is None else device_spec(device)
    if spec is None:
        return Gpu(memory_bytes=memory)
    return Gpu(spec.name, (8, 0) if spec.bf16 else (7, 0), memory)


def _on_gpus(config: RunConfig, gpus: Sequence[Gpu], memory: int | None) -> RunConfig:
    """Check a configuration as on these GPUs, which decide engine, micro-batch, precision and division of work."""
    try:
        return checks.check(config, {}, gpus, memory=memory)
    except InputError as error:
        if (error.key, error.value) != ("engine.name", "auto"):
            raise
        # No engine fits: the plan shows by how much.
        return checks.check(config, {}, gpus)


def size(key: str, text: str) -> int:
    """Return a size such as 80GB, 24GiB or 80 (gigabytes) in bytes.

    Raises:
        InputError: it is not a size.
    """
    match = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?)\s*([a-z]*)", text.strip().lower())
    unit = _UNITS.get(match[2]) if match else None
    if match is None or unit is None or float(match[1]) <= 0:
        raise InputError(key, text, "is not a memory size", allowed="80GB, 24GiB, 96", fix=f"{key}=80GB")
    return round(float(match[1]) * unit)


def _parse(argv: Sequence[str]) -> _Request:
    # Options are also understood in the spelling of keys.
    argv = [f"--{argument}" if argument.startswith("device_memory=") else argument for argument in argv]
    arguments = command_line.parse("plan", argv, keeps_unknown=True)
    options = arguments.options
    processes = options.world_size
    if processes is not None and not (processes.isdecimal() and 0 < len(processes.lstrip("0")) < 10):
        allowed, fix = "1, 2, 3, …", "--world-size 8"
        raise InputError("--world-size", processes, "is not a number of processes", allowed=allowed, fix=fix)
    device = None if options.device is None else device_name(options.device)
    memory = size("--memory", options.memory or DEVICE_MEMORY)
    if device is not None and options.memory is None and (spec := device_spec(device)) is not None:
        memory = int(spec.memory)
    return _Request(
        arguments.rest,
        int(processes) if processes else None,
        device,
        memory,
        size("--network", (options.network or NETWORK).removesuffix("/s")),
        bool(device or options.memory),
        options.json,
    )


def device_name(text: str) -> str:
    """Return the name in the table of devices for what a user types, such as h100, 4090 or mi300x.

    Raises:
        InputError: the device is unknown.
    """
    for name in (text, f"RTX {text}"):
        if (spec := device_spec(name)) is not None:
            return spec.name
    names = [spec.name for spec in DEVICES]
    guess = closest(text, names)
    reason = "is not a device with known figures; give its memory instead"
    raise InputError("--device", text, reason, allowed=names, suggestion=guess, fix="--memory 80GB")


def _with_world_size(overrides: Sequence[str], world_size: int | None) -> list[str]:
    if world_size is None:
        return list(overrides)
    keys = {override.partition("=")[0] for override in overrides}
    overrides = [*overrides, f"world_size={world_size}"]
    if "batch_size" not in keys:
        # One sequence a process, where the default batch is smaller than the cluster.
        default = RunConfig().batch_size
        overrides.append(f"batch_size={max(default, world_size) // world_size * world_size}")
    return overrides


def _progress() -> Callable[[str], None]:
    """Overwrite one line of a terminal; say nothing where standard error is a file."""
    if not sys.stderr.isatty():
        return lambda text: None
    return lambda text: print(f"\r\x1b[Kplan: {text} …\r", end="", file=sys.stderr, flush=True)


def _show(config: RunConfig, estimates: dict[str, Any]) -> None:
    from rich.table import Table

    from harness.console import for_tables

    if sys.stderr.isatty():
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)
    console = for_tables()
    title = f"{config.model.name}, {config.optimizer.name}, {config.engine.name} on {config.world_size}"
    table = Table(title=f"{title} process(es): the worst rank", title_justify="left")
    for column in ("what", "MiB"):
        table.add_column(column, justify="left" if column == "what" else "right")
    for kind, bytes_held in estimates["per_rank"].items():
        table.add_row(f"forward and backward: {kind}", _mib(bytes_held))
    table.add_section()
    for name, phase in estimates["phases"].items():
        table.add_row(f"phase {name}, in total", _mib(phase["total_bytes"]))
    host = estimates["phases"]["checkpoint"]["host_bytes"]
    table.add_row("host memory for checkpoints (ddp: of rank 0)", _mib(host))
    table.add_section()
    for kind, bytes_sent in estimates["traffic_per_step"].items():
        table.add_row(f"sends a step: {kind}", _mib(bytes_sent))
    console.print(table)
    kept, margin = estimates["activations"], estimates["margin"]
    if kept is None:
        console.print("Activations are not counted: this model's code cannot run on fake tensors.")
    else:
        others = ", ".join(
            f"{_mib(kept[mode])} MiB with activation checkpointing {label}"
            for mode, label in (("without_checkpointing", "off"), ("with_checkpointing", "on"))
        )
        console.print(
            f"Activations of a micro-batch of {kept['micro_batch_size']} × {config.seq_len} tokens: {others}."
        )
    console.print(
        f"Needs {estimates['needed_bytes'] / 1e9:.1f} GB of device memory: the largest phase "
        f"({estimates['peak_phase']}), {margin['fragmentation']:.0%} fragmentation, "
        f"{margin['context_bytes'] / 1e9:g} GB for the CUDA context and NCCL, {margin['reserve']:.0%} in reserve."
    )
    if estimates["fits"] is not None:
        verdict = "yes" if estimates["fits"] else "no"
        console.print(
            f"Fits in {estimates['device_memory'] / 1e9:g} GB: {verdict} (--device NAME or --memory SIZE)"
        )
        if not estimates["fits"] and (line := memory_estimate.warning(config, estimates["device_memory"])):
            console.print(line)
    if estimates["step_time_s"]:
        _show_times(console, estimates["step_time_s"])
    simulated = estimates["ranks_looked_at"]
    if 1 < len(simulated) < estimates["world_size"]:
        console.print(f"Simulated ranks {', '.join(map(str, simulated))}.")
    if len(estimates["depths_looked_at"]) > 1:
        depths = " and ".join(map(str, estimates["depths_looked_at"]))
        console.print(f"Counted at {depths} layers and extrapolated: every layer adds the same.")
    if line := model_checks.alignment_warning(config):
        console.print(f"Warning: {line}.")
    console.print("Not counted: workspaces inside of kernels. Nothing here was measured on a GPU.")


def _show_times(console: Any, times: dict[str, dict[str, float]]) -> None:
    from rich.table import Table

    title = "Seconds of a step: lower bound by data sheet (model, optimizer, exposed communication) and expected band"
    table = Table(title=title, title_justify="left")
    columns = ("device", "model", "optimizer", "communication", "at least", "expected", "tokens/s expected")
    for column in columns:
        table.add_column(column, justify="left" if column == "device" else "right")
    for name, time in times.items():
        parts = (time[part] for part in ("model", "optimizer", "exposed_communication", "total"))
        table.add_row(
            name,
            *(f"{part:.3g}" for part in parts),
            f"{time['expected_from']:.3g} to {time['expected_to']:.3g}",
            f"{time['expected_tokens_per_s_from']:,.0f} to {time['expected_tokens_per_s_to']:,.0f}",
        )
    console.print(table)


def _mib(count: float) -> str:
    return f"{count / 2**20:,.2f}"
