"""Environment variables of training processes on GPUs, each only where the user gave no value. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

FLIGHT_RECORDER = "flight_recorder"
"""Folder below a run folder for what NCCL's flight recorder writes when a collective times out: ``rank_0``, …"""
ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
"""Names under which torch 2.13 reads the settings of its CUDA allocator."""


def of_launcher(environ: Mapping[str, str]) -> dict[str, str]:
    """Return what to set for a launcher, which would otherwise set it for its processes in its own way."""
    # torchrun's default is 1: abort the communicators first, which may hang (ncclCommAbort). 3 is that of torch
    # itself: end the process at once.
    return _absent(environ, {"TORCH_NCCL_ASYNC_ERROR_HANDLING": "3"})


def of_process(environ: Mapping[str, str], folder: Path) -> dict[str, str]:
    """Return what to set before torch is imported.

    Args:
        environ: of this process.
        folder: the run folder.
    """
    values = {
        # The recorder itself is on in torch 2.13 (TORCH_FR_BUFFER_SIZE, 2,000 entries).
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
        "TORCH_FR_DUMP_TEMP_FILE": str(folder.absolute() / FLIGHT_RECORDER / "rank_"),
    }
    if not any(name in environ for name in ALLOCATOR):
        # Segments that grow keep batches and probes of different sizes from fragmenting the memory.
        values[ALLOCATOR[0]] = "expandable_segments:True"
    return _absent(environ, values)


def _absent(environ: Mapping[str, str], values: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in values.items() if name not in environ}
