"""What started this process, and how many devices are here; without importing torch."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import psutil
import yaml

from harness.errors import InputError

_MULTI = (
    "ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes {n} --num_machines 1 "
    "--mixed_precision no --dynamo_backend no -m harness.train world_size={n} …"
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
    """The launcher's WORLD_SIZE, RANK and LOCAL_RANK; None without a launcher.

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


def visible_devices(environ: Mapping[str, str] = os.environ) -> int:
    """NVIDIA GPUs that this process may use, from the driver and CUDA_VISIBLE_DEVICES."""
    if cpu_is_requested(environ):
        return 0
    present = _present_devices()
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return present
    names = [name.strip() for name in visible.split(",")]
    # CUDA stops reading at the first invalid entry.
    valid = next((place for place, name in enumerate(names) if name in ("", "-1")), len(names))
    return min(valid, present)


def parent_command_lines(levels: int = 2) -> list[list[str]]:
    """Command lines of the processes above this one, nearest first; fewer where they may not be read."""
    lines: list[list[str]] = []
    try:
        for process in psutil.Process().parents()[:levels]:
            lines.append(process.cmdline())
    except psutil.Error:
        pass
    return lines


def requested_processes(command: Sequence[str]) -> int | None:
    """Processes that an `accelerate launch` line asks for; None if it is another program or says nothing."""
    names = [Path(word).name for word in command]
    program = next((place for place, name in enumerate(names) if name in _PROGRAMS), None)
    if program is None:
        return None
    words = list(command[program + 1 :])
    number = _flag(words, "num_processes")
    if number is None and (file := _flag(words, "config_file")) is not None:
        try:
            content = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError):
            return None
        number = str(content.get("num_processes", "")) if isinstance(content, dict) else None
    return int(number) if number and number.isdecimal() else None


def check_one_process_was_meant(commands: Sequence[Sequence[str]]) -> None:
    """`accelerate launch --cpu --num_processes 2` starts one process and says nothing; we do.

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


def _flag(words: Sequence[str], name: str) -> str | None:
    spellings = (f"--{name}", f"--{name.replace('_', '-')}")
    for place, word in enumerate(words):
        flag, equals, value = word.partition("=")
        if flag in spellings:
            return value if equals else (words[place + 1] if place + 1 < len(words) else None)
    return None


def _present_devices() -> int:
    gpus = Path("/proc/driver/nvidia/gpus")
    try:
        return sum(1 for entry in gpus.iterdir() if entry.is_dir())
    except OSError:
        pass
    program = shutil.which("nvidia-smi")
    if program is None:
        return 0
    try:
        listing = subprocess.run([program, "-L"], capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return 0
    return (
        sum(line.startswith("GPU ") for line in listing.stdout.splitlines()) if listing.returncode == 0 else 0
    )
