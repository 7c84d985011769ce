"""The GPUs of this machine, asked from the driver without torch."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

DEVICE_FOLDER = Path("/dev")
QUERY_S = 60.0
"""Time for nvidia-smi, s: without persistence mode the driver first initializes every GPU, some seconds each."""
_BF16_SINCE = (8, 0)
"""CUDA compute capability of the first GPUs with bf16 units (A100)."""
_QUERY = ("--query-gpu=compute_cap,memory.total,name", "--format=csv,noheader,nounits")


class Gpu(NamedTuple):
    """What the driver says about one GPU.

    Attributes:
        name: as the driver writes it; "" unknown.
        capability: CUDA compute capability, (major, minor); None: unknown.
        memory_bytes: of the whole device; None: unknown.
    """

    name: str = ""
    capability: tuple[int, int] | None = None
    memory_bytes: int | None = None


def present() -> Sequence[Gpu]:
    """Return the NVIDIA GPUs that this machine, or the container that it is, lets this process use.

    A GPU that is cut into MIG slices counts once: CUDA shows a process one slice. The driver's folder in /proc is not
    read, because in a container it lists all GPUs of the host.
    """
    program = shutil.which("nvidia-smi")
    gpus = _ask(program) if program is not None else None
    if gpus is not None:
        return gpus
    return tuple(Gpu() for path in DEVICE_FOLDER.glob("nvidia*") if re.fullmatch(r"nvidia\d+", path.name))


def have_bf16(gpus: Sequence[Gpu]) -> bool:
    """Return True if all GPUs multiply bf16 in hardware, as all data-center GPUs since 2020 do.

    A GPU whose capability the driver does not tell counts as such.
    """
    return all(gpu.capability is None or gpu.capability >= _BF16_SINCE for gpu in gpus)


@cache
def _ask(program: str) -> tuple[Gpu, ...] | None:
    """Return the GPUs that nvidia-smi lists; None if it cannot be asked."""
    table = _output(program, *_QUERY)
    gpus = tuple(map(_parse, table)) if table else ()
    if gpus and None not in gpus:
        return tuple(gpu for gpu in gpus if gpu is not None)
    # Drivers before 510 do not know compute_cap. Slices of a GPU ("  MIG 1g.10gb …") are indented.
    listing = _output(program, "-L")
    return None if listing is None else tuple(Gpu() for line in listing if line.startswith("GPU "))


def _output(program: str, *arguments: str) -> list[str] | None:
    try:
        done = subprocess.run(
            [program, *arguments], capture_output=True, text=True, timeout=QUERY_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.splitlines() if done.returncode == 0 else None


def _parse(line: str) -> Gpu | None:
    """Return the GPU of a line such as ``9.0, 81559, NVIDIA H100 80GB HBM3`` (MiB); None: it is something else."""
    fields = [field.strip() for field in line.split(",", 2)]
    if len(fields) != 3:
        return None
    capability = re.fullmatch(r"(\d{1,3})\.(\d{1,3})", fields[0])
    memory = int(fields[1]) << 20 if fields[1].isdecimal() else None
    return Gpu(fields[2], (int(capability[1]), int(capability[2])) if capability else None, memory)
