"""Facts of a machine's GPUs for environment.json: software versions, and what nvidia-smi says of them."""

from __future__ import annotations

import csv
import re
import shutil
import subprocess
from typing import Any

import torch
import torch.distributed as dist
from torch.cuda import nccl

TIMEOUT_S = 15.0
"""Longest wait for nvidia-smi, which may hang on a broken GPU."""
QUERIES = {
    "name": "name",
    "driver_version": "driver",
    "memory.total": "memory_mib",
    "clocks.max.sm": "max_sm_mhz",
    "clocks.max.memory": "max_memory_mhz",
    "clocks.applications.graphics": "application_sm_mhz",
    "power.limit": "power_limit_w",
    "power.max_limit": "max_power_limit_w",
    "mig.mode.current": "mig",
    "ecc.mode.current": "ecc",
    "persistence_mode": "persistence",
    "pcie.link.gen.max": "pcie_generation",
    "pcie.link.width.max": "pcie_width",
}
"""Property that nvidia-smi is asked for → key in environment.json. None of them identifies a machine or a user."""
_ESCAPE = re.compile(r"\x1b\[[0-9;]*m")


def machine(device: torch.device) -> dict[str, Any] | None:
    """Return versions, topology and GPUs of this machine; None where a run trains on CPUs.

    GPUs are those of the whole machine, of which a run may use a part. What cannot be found out is None.
    """
    if device.type != "cuda":
        return None
    return {
        "visible_gpus": torch.cuda.device_count(),
        "cuda": torch.version.cuda,
        "rocm": torch.version.hip,
        "cudnn": torch.backends.cudnn.version(),
        "nccl": _nccl(),
        "gpus": _gpus(),
        "topology": _topology(),
    }


def of_process(device: torch.device) -> dict[str, Any]:
    """Return name, memory in bytes and compute capability of a process' device; of a CPU its kind only."""
    if device.type != "cuda":
        return {"name": device.type}
    properties = torch.cuda.get_device_properties(device)
    return {
        "name": properties.name,
        "memory_bytes": properties.total_memory,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
    }


def of_all_processes(device: torch.device, world_size: int) -> list[dict[str, Any]]:
    """Return `of_process` of every process, by rank (a collective)."""
    mine = of_process(device)
    if world_size == 1:
        return [mine]
    devices: list[dict[str, Any]] = [{} for _ in range(world_size)]
    dist.all_gather_object(devices, mine)
    return devices


def _nccl() -> str | None:
    # A build without NCCL has no such function, and older ones return a number.
    try:
        version = nccl.version()
    except (AttributeError, RuntimeError):
        return None
    return ".".join(map(str, version)) if isinstance(version, tuple) else str(version)


def _gpus() -> list[dict[str, str | None]] | None:
    """Return a dict per GPU of this machine, or None without nvidia-smi."""
    output = _nvidia_smi(f"--query-gpu={','.join(QUERIES)}", "--format=csv,noheader,nounits")
    if output is None:
        return None
    return [
        {key: _known(value) for key, value in zip(QUERIES.values(), row)}
        for row in csv.reader(output.splitlines(), skipinitialspace=True)
        if len(row) == len(QUERIES)
    ]


def _known(value: str) -> str | None:
    value = value.strip()
    return None if value.strip("[]").upper() in ("", "N/A", "NOT SUPPORTED", "UNKNOWN ERROR") else value


def _topology() -> list[str] | None:
    """Return the lines of the matrix that says how GPUs and network cards are connected."""
    output = _nvidia_smi("topo", "-m")
    return (
        None
        if output is None
        else [_ESCAPE.sub("", line).rstrip() for line in output.strip("\n").splitlines()]
    )


def _nvidia_smi(*arguments: str) -> str | None:
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    try:
        answer = subprocess.run(
            [program, *arguments], capture_output=True, text=True, timeout=TIMEOUT_S, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout
