"""Replicated weights: one process, or DistributedDataParallel through Accelerate (gloo on CPUs, NCCL on GPUs)."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedDataParallelKwargs
from torch import nn

from harness.config.errors import InputError
from harness.config.schema import RunConfig


class ReplicatedEngine:
    """Engines `single` and `ddp`: every process holds all weights and sees the mean gradient.

    Accelerate owns processes and devices and wraps the model. Mixed precision, loss scaling and the
    optimizer step are ours: Accelerate's wrappers refuse fp16 on CPUs, and its optimizer wrapper decides on
    the host whether a step is skipped, which waits for the device in every step.
    """

    def __init__(self, config: RunConfig) -> None:
        cpu = not torch.cuda.is_available()
        torch.set_num_threads(config.engine.threads or _threads_per_process())
        ddp = DistributedDataParallelKwargs(
            bucket_cap_mb=config.engine.bucket_mb,
            gradient_as_bucket_view=True,
        )
        self._accelerator = Accelerator(cpu=cpu, mixed_precision="no", kwargs_handlers=[ddp])
        self.name = config.engine.name
        self.rank = self._accelerator.process_index
        self.world_size = self._accelerator.num_processes
        self.device = self._accelerator.device
        if self.world_size != config.world_size:
            raise InputError(
                "world_size",
                config.world_size,
                f"disagrees with the launcher, which started {self.world_size}",
                fix=f"world_size={self.world_size}, or start {config.world_size} processes",
            )
        self._precision = config.precision
        self._scaler = torch.amp.GradScaler(self.device.type, enabled=config.precision == "fp16")
        self.model: nn.Module
        self._optimizer: torch.optim.Optimizer
        self._parameters: list[nn.Parameter] = []

    def process_group(self) -> dist.ProcessGroup | None:
        return dist.group.WORLD if self.world_size > 1 else None

    def prepare(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.model = self._accelerator.prepare_model(model)
        self._optimizer = optimizer
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        if isinstance(self.model, nn.parallel.DistributedDataParallel):
            # Buffers (rotary frequencies) are the same everywhere; sending them costs a collective per forward.
            self.model.forward_sync_buffers = False
            # Default: one sample in 100 iterations, too few for rows that describe every step.
            self.model._set_ddp_runtime_logging_sample_rate(1)

    def autocast(self) -> AbstractContextManager[object]:
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self._precision)
        return torch.autocast(self.device.type, dtype=dtype) if dtype else nullcontext()

    def backward(self, loss: torch.Tensor) -> None:
        self._scaler.scale(loss).backward()

    def micro_step(self, *, last: bool) -> AbstractContextManager[object]:
        """Around forward and backward of a micro-batch: only the last one communicates."""
        return nullcontext() if last else self._accelerator.no_sync(self.model)

    def clip(self, max_norm: float | None) -> tuple[torch.Tensor, torch.Tensor]:
        if self._scaler.is_enabled():
            self._scaler.unscale_(self._optimizer)
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        # fp32 accumulation and result: a norm rounded to bf16 would be off by up to 0.4 %.
        norms = torch._foreach_norm(gradients, 2, dtype=torch.float32)  # pyright: ignore[reportPrivateImportUsage]
        norm = torch.linalg.vector_norm(torch.stack(norms))
        nonfinite = (~torch.isfinite(norm)).float()
        if max_norm is not None:
            # A non-finite norm gives a useless factor, but then the update is masked anyway.
            factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
            torch._foreach_mul_(gradients, factor)  # pyright: ignore[reportPrivateImportUsage]
        return norm, nonfinite

    def update(self, nonfinite: torch.Tensor) -> None:
        # Ours, and torch's fused ones: they read `found_inf` on the device.
        if hasattr(self._optimizer, "found_inf") or getattr(
            self._optimizer, "_step_supports_amp_scaling", False
        ):
            self._optimizer.found_inf = nonfinite  # pyright: ignore[reportAttributeAccessIssue]
            self._optimizer.step()
        elif not nonfinite.item():
            # A plug-in without torch's AMP protocol: the host has to decide, which waits for the device.
            self._optimizer.step()
        if self._scaler.is_enabled():
            self._scaler.update()

    def sum(self, value: torch.Tensor) -> torch.Tensor:
        return self._reduced(value, dist.ReduceOp.SUM)

    def max(self, value: torch.Tensor) -> torch.Tensor:
        return self._reduced(value, dist.ReduceOp.MAX)

    def _reduced(self, value: torch.Tensor, op: dist.ReduceOp.RedOpType) -> torch.Tensor:
        value = value.detach().clone()
        if self.world_size > 1:
            dist.all_reduce(value, op)
        return value

    def vote(self, value: torch.Tensor) -> Callable[[], list[float]]:
        work = dist.all_reduce(value, dist.ReduceOp.MAX, async_op=True) if self.world_size > 1 else None
        if value.device.type == "cpu":
            return lambda: (work.wait(), value.tolist())[1] if work else value.tolist()
        if work:
            work.wait()  # NCCL: orders the current stream behind the reduction, does not block the host
        host = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
        host.copy_(value, non_blocking=True)
        done = torch.cuda.Event()
        done.record()
        return lambda: (done.synchronize(), host.tolist())[1]

    def exposed_communication(self) -> float | None:
        if not isinstance(self.model, nn.parallel.DistributedDataParallel):
            return 0.0
        data = self.model._get_ddp_logging_data()
        total, hidden = data.get("backward_comm_time"), data.get("backward_compute_comm_overlap_time")
        return None if not total else max(0.0, (int(total) - int(hidden or 0)) * 1e-9)

    def close(self) -> None:
        self._accelerator.wait_for_everyone()
        if dist.is_initialized():
            dist.destroy_process_group()


def _threads_per_process() -> int:
    chosen = os.environ.get("OMP_NUM_THREADS", "")
    # Under a launcher it is the launcher's default of one thread, not a choice of the user's.
    if chosen.isdecimal() and int(chosen) > 0 and "WORLD_SIZE" not in os.environ:
        return int(chosen)
    local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    return max(1, cores // local)
