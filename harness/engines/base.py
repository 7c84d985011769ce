"""Base of the engines: the processes of a run, small reductions between them, and leaving together."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch import nn
from torch._C._distributed_c10d import HashStore
from torch.distributed import distributed_c10d

from harness.config.schema import RunConfig
from harness.devices import claim_gpu, cpu_cores, uses_cuda
from harness.engines.materialize import fill_whole
from harness.errors import InputError
from harness.process.waiting import wait_until
from harness.protocols import WeightSource

WATCHDOG_S = 60.0
"""How long after ``engine.timeout_s`` NCCL's watchdog aborts a process, s: the wait of `reduce_flags` ends before, with
an exception that the record can name."""


class ProcessEngine:
    """This process among those that a launcher started (gloo on CPUs, NCCL on GPUs). Base of the engines.

    Args:
        config: a checked configuration.
        needs_group: a process group exists also where there is one process.

    Raises:
        InputError: the launcher started another number of processes than ``world_size``, or more than there are GPUs;
            or processes chose differently what follows from the GPUs that they see.
    """

    name: str
    rank: int
    world_size: int
    shards: int = 1
    forward_is_local: bool = True
    device: torch.device

    def __init__(self, config: RunConfig, *, needs_group: bool = False) -> None:
        # torch's own wrappers call collectives under names that it deprecated.
        warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
        torch.set_num_threads(config.engine.threads or _threads_per_process())
        self._timeout_s = config.engine.timeout_s
        on_gpu = uses_cuda()
        self._timeout = timedelta(seconds=self._timeout_s + on_gpu * WATCHDOG_S)
        options: dict[str, Any] = {"timeout": self._timeout}
        if on_gpu:
            # Bound to its device, a group connects now, where an error names the cause, and never guesses a device.
            options["device_id"] = claim_gpu()
            if config.tf32:
                # Not the newer per-operator setting: after it, inductor's read of this one raises (torch 2.13).
                torch.set_float32_matmul_precision("high")
        with without_accelerate_plugins():
            state = PartialState(cpu=not on_gpu, **options)
        self.name = config.engine.name
        self.rank, self.world_size = state.process_index, state.num_processes
        self.device = torch.device(state.device or "cpu")
        if self.world_size != config.world_size:
            raise InputError(
                "world_size",
                config.world_size,
                f"disagrees with the launcher, which started {self.world_size}",
                fix=f"world_size={self.world_size}, or start {config.world_size} processes",
            )
        if self.world_size > 1:
            _require_same_choices(config, self.world_size)
        if needs_group and not dist.is_initialized():
            backend = "gloo" if self.device.type == "cpu" else "nccl"
            dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1, **options)

    def shard(
        self,
        model: nn.Module,
        axes: Mapping[str, int],
        blocks: Sequence[nn.Module],
        weights: WeightSource | None = None,
    ) -> None:
        """Put the whole model on the device: the optimizer is built on whole parameters."""
        if weights is None:
            model.to(self.device)
        else:
            fill_whole(model, weights, self.device)

    def measure_communication(self, on: bool) -> None:
        """Do nothing: gradient communication is not measured."""

    def set_collective_timeout(self) -> None:
        """Give every process group the configured timeout."""
        # Meshes and DeepSpeed make groups with torch's default of half an hour.
        for group in list(distributed_c10d._world.pg_map):
            distributed_c10d._set_pg_timeout(self._timeout, group)

    def sum(self, value: torch.Tensor) -> torch.Tensor:
        """Return the sum over the processes (a copy)."""
        return self._reduced(value, dist.ReduceOp.SUM)

    def max(self, value: torch.Tensor) -> torch.Tensor:
        """Return the maximum over the processes (a copy)."""
        return self._reduced(value, dist.ReduceOp.MAX)

    def _reduced(self, value: torch.Tensor, op: dist.ReduceOp.RedOpType) -> torch.Tensor:
        value = value.detach().clone()
        if self.world_size > 1:
            dist.all_reduce(value, op)
        return value

    def reduce_flags(self, flags: torch.Tensor) -> Callable[[], list[float]]:
        """Start a maximum over the processes without blocking; calling the result waits for it."""
        work = dist.all_reduce(flags, dist.ReduceOp.MAX, async_op=True) if self.world_size > 1 else None
        if flags.device.type == "cpu":
            return lambda: (work.wait(), flags.tolist())[1] if work else flags.tolist()
        if work:
            work.wait()  # NCCL: orders the current stream behind the reduction, does not block the host
        host = torch.empty(flags.shape, dtype=flags.dtype, pin_memory=True)
        host.copy_(flags, non_blocking=True)
        done = torch.cuda.Event()
        done.record()
        # One process has no collective to wait for, and its device may be any number of seconds behind.
        limit = self._timeout_s if work else math.inf
        what = "a step's collectives: another process has not joined them, or its device is still computing"
        return lambda: (wait_until(done.query, limit, what), host.tolist())[1]

    def sync_from_masters(self) -> None:
        """Do nothing: the weights have no separate masters."""

    def warm_up(self, step: Callable[[], object]) -> None:
        """Do nothing: the first step adds up as every other."""

    def release(self) -> None:
        """Undo what the engine did to this process, which stays in the process group."""

    def close(self) -> None:
        """Wait for the others and leave the process group."""
        self.release()
        if dist.is_initialized():
            dist.barrier(device_ids=[self.device.index or 0] if self.device.type == "cuda" else None)
            dist.destroy_process_group()


@contextmanager
def without_accelerate_plugins() -> Iterator[None]:
    """Hide from Accelerate that its launcher was given an FSDP or a DeepSpeed configuration.

    `harness.config.engine_checks` compared it with ours; Accelerate itself would answer by another backend
    (on CPUs by none at all: every process would believe that it is the only one).
    """
    names = ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP")
    saved = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(saved)


def _require_same_choices(config: RunConfig, world_size: int) -> None:
    """Refuse processes that chose differently: each chose by the GPUs of its own machine (a collective).

    They would wait for each other in different collectives.
    """
    mine = {
        "engine.name": config.engine.name,
        "micro_batch_size": config.micro_batch_size,
        "engine.optimizer_work": config.engine.optimizer_work,
        "precision": config.precision,
        "optimizer.orthogonalizer": config.optimizer.options.get("orthogonalizer"),
    }
    everyone: list[Any] = [None] * world_size
    dist.all_gather_object(everyone, mine)
    for key, value in everyone[0].items():
        ranks = [rank for rank, other in enumerate(everyone) if other[key] != value]
        if ranks:
            other = everyone[ranks[0]][key]
            reason = (
                f"was chosen on rank 0, and {other} on rank {ranks[0]}: the GPUs of their machines differ"
            )
            raise InputError(key, value, reason, fix=f"{key}={other}, or {key}={value}, for all of them")


def _threads_per_process() -> int:
    threads = os.environ.get("OMP_NUM_THREADS", "")
    # Under a launcher it is the launcher's default of one thread, not a choice of the user's.
    if threads.isdecimal() and int(threads) > 0 and "WORLD_SIZE" not in os.environ:
        return int(threads)
    local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return max(1, cpu_cores() // local)
