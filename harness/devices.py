"""The device that a process trains on, the bytes that it holds there, and the facts of its machine."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Iterable, Mapping
from importlib import metadata
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from harness import gpu_facts
from harness.config import launcher

PACKAGES = (
    "optbench",
    "torch",
    "accelerate",
    "deepspeed",
    "transformers",
    "tokenizers",
    "datasets",
    "wandb",
    "numpy",
)
"""Packages whose versions environment.json records."""


def uses_cuda(environ: Mapping[str, str] = os.environ) -> bool:
    """Return True if training runs on GPUs: there is one, and ACCELERATE_USE_CPU does not ask for the CPU.

    Accelerate's `PartialState` does not read that variable, so every choice of device or backend must ask here.
    """
    return torch.cuda.is_available() and not launcher.cpu_is_requested(environ)


def claim_gpu(environ: Mapping[str, str] = os.environ) -> torch.device:
    """Make this process' GPU the current one, before anything creates a process group, and return it.

    NCCL guesses a device for collectives that come before `torch.cuda.set_device`, and two processes on one GPU end
    in "Duplicate GPU detected" minutes later.

    Raises:
        InputError: this machine has fewer visible GPUs than processes.
    """
    local_rank = int(environ.get("LOCAL_RANK", "0"))
    processes = max(int(environ.get("LOCAL_WORLD_SIZE", "1")), local_rank + 1)
    launcher.check_gpus(processes, torch.cuda.device_count())
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def device_name(device: torch.device) -> str:
    """Return the name of a GPU as its driver reports it, or "cpu"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def cpu_cores() -> int:
    """Return the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


def tensor_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Return the bytes of the elements on this process; memory that tensors share (tied weights, views) counts once."""
    seen: set[tuple[int, int]] = set()
    total = 0
    for tensor in tensors:
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        key = (local.untyped_storage().data_ptr(), int(local.storage_offset()))
        if key not in seen or key[0] == 0:
            seen.add(key)
            total += local.numel() * local.element_size()
    return total


def environment(device: torch.device, world_size: int) -> dict[str, Any]:
    """Return versions, devices, threads and the git commit of the current folder, if it is a repository.

    Host name, user name and paths of the machine are left out.
    """
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "packages": {name: _version(name) for name in PACKAGES},
        "device": device_name(device),
        "world_size": world_size,
        "threads_per_process": torch.get_num_threads(),
        "cpu_cores": os.cpu_count(),
        "cuda": torch.version.cuda,
        "machine": gpu_facts.machine(device),
        "git": _git(),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git() -> dict[str, Any] | None:
    def git(*words: str) -> str:
        return subprocess.run(
            ["git", *words], capture_output=True, text=True, timeout=5, check=True
        ).stdout.strip()

    try:
        return {
            "commit": git("rev-parse", "HEAD"),
            "modified": bool(git("status", "--porcelain", "--untracked-files=no")),
        }
    except (OSError, subprocess.SubprocessError):
        return None
