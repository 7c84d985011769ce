"""Runs that train side by side on this machine: whether their memory fits, and the CPU threads of each. Torch-free."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace

import psutil

from analysis.formatting import size
from harness.config import memory_estimate
from harness.config.launcher import visible_devices
from harness.config.schema import RunConfig
from harness.errors import InputError
from harness.preparation import Prepared

PROCESS_BYTES = 450 * 2**20
"""Memory of a training process before its model, with torch and transformers: 395 MiB were measured."""
KEEP_FREE = 0.05
"""Share of the free memory that is left alone."""


def prepared(runs: Sequence[Prepared], concurrency: int) -> list[Prepared]:
    """Return the runs with their share of the CPU threads, after checking that ``concurrency`` of them fit.

    A run keeps its own ``engine.threads``, and OMP_NUM_THREADS counts as in any run; identities stay.

    Raises:
        InputError: there are GPUs, which a run has for itself, or the memory of the largest runs is not free.
    """
    if concurrency == 1 or not runs:
        return list(runs)
    if visible_devices():
        reason = "is for CPUs: a run uses all GPUs of this machine"
        raise InputError("concurrency", concurrency, reason, fix="concurrency=1, or optbench submit sweep …")
    _check_memory([run.config for run in runs], concurrency)
    return [_with_threads(run, concurrency) for run in runs]


def needed_bytes(config: RunConfig) -> float:
    """Return the estimated memory of all processes of a run (`harness.config.memory_estimate`), bytes."""
    assert config.world_size is not None
    return config.world_size * (PROCESS_BYTES + memory_estimate.peak_bytes(config))


def _check_memory(configs: Sequence[RunConfig], concurrency: int) -> None:
    largest = sorted(map(needed_bytes, configs), reverse=True)[:concurrency]
    free = (1 - KEEP_FREE) * psutil.virtual_memory().available
    if sum(largest) <= free:
        return
    fits = max(1, int(free // largest[0]))
    reason = f"needs about {size(sum(largest))} for the largest runs, and {size(free)} of memory are free"
    raise InputError("concurrency", concurrency, reason, fix=f"concurrency={fits}")


def _with_threads(run: Prepared, concurrency: int) -> Prepared:
    """Return the run with its share of the cores, unless it sets its threads or the environment does."""
    engine, world_size = run.config.engine, run.config.world_size
    assert world_size is not None
    if engine.threads is not None or os.environ.get("OMP_NUM_THREADS", "").isdecimal():
        return run
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    threads = max(1, cores // (concurrency * world_size))
    config = run.config.model_copy(update={"engine": engine.model_copy(update={"threads": threads})})
    return replace(run, config=config, overrides=(*run.overrides, f"engine.threads={threads}"))
