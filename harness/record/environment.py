"""environment.json: with what, and on what, a run was made. No host name, user name or path of the machine."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from typing import Any

import torch

from harness.devices import device_name

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


def describe(device: torch.device, world_size: int) -> dict[str, Any]:
    """Versions, devices, threads and the git commit of the current folder, if it is a repository."""
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "packages": {name: _version(name) for name in PACKAGES},
        "device": device_name(device),
        "world_size": world_size,
        "threads_per_process": torch.get_num_threads(),
        "cpu_cores": os.cpu_count(),
        "cuda": torch.version.cuda,
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
