"""Replicated weights: one process, or DistributedDataParallel through Accelerate (gloo on CPUs, NCCL on GPUs)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedDataParallelKwargs
from torch import nn

from harness.config.schema import RunConfig
from harness.devices import tensor_bytes
from harness.engines.base import without_accelerate_plugins
from harness.engines.skip_step import SkipStepEngine
from harness.protocols import WeightLayout
from optimizers.layouts.replicated import ReplicatedLayout

NEVER = 2**31 - 1
"""Sample rate of DDP's timers with which they run in its first ten steps only, where torch always samples."""


class ReplicatedEngine(SkipStepEngine):
    """Engines `single` and `ddp`: every process holds all weights and sees the mean gradient.

    Accelerate owns processes and devices and wraps the model; mixed precision is ours.
    """

    layout: WeightLayout = "replicated"

    def __init__(self, config: RunConfig) -> None:
        super().__init__(config)
        ddp = DistributedDataParallelKwargs(
            bucket_cap_mb=config.engine.bucket_mb, gradient_as_bucket_view=True
        )
        with without_accelerate_plugins():
            self._accelerator = Accelerator(
                cpu=self.device.type == "cpu", mixed_precision="no", kwargs_handlers=[ddp]
            )
        self._precision = config.precision
        self._is_measuring = False
        self.model: nn.Module
        self._module: nn.Module

    def process_group(self) -> dist.ProcessGroup | None:
        return dist.group.WORLD if self.world_size > 1 else None

    def prepare(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self._module = model
        self.model = self._accelerator.prepare_model(model)
        self._optimizer = optimizer
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        if isinstance(self.model, nn.parallel.DistributedDataParallel):
            # Buffers (rotary frequencies) are the same everywhere; sending them costs a collective per forward.
            self.model.forward_sync_buffers = False
            self.model._set_ddp_runtime_logging_sample_rate(NEVER)

    def measure_communication(self, on: bool) -> None:
        """Let DDP's timers run in the next step, or not."""
        # A forward pass that finds a sample waits on CUDA for the events of the step before
        # (`Logger::set_runtime_stats_and_log`), so that the host could not run ahead if every step were one.
        if on != self._is_measuring and isinstance(self.model, nn.parallel.DistributedDataParallel):
            self.model._set_ddp_runtime_logging_sample_rate(1 if on else NEVER)
            self._is_measuring = on

    def autocast(self) -> AbstractContextManager[object]:
        return autocast(self._precision, self.device)

    def micro_step(self, *, last: bool) -> AbstractContextManager[object]:
        """Enclose forward and backward of a micro-batch: only the last one communicates."""
        return nullcontext() if last else self._accelerator.no_sync(self.model)

    @contextmanager
    def inference(self) -> Iterator[nn.Module]:
        """Give the module itself."""
        # Its DDP wrapper has nothing to add without gradients.
        yield self._module

    def exposed_communication(self) -> float | None:
        if not isinstance(self.model, nn.parallel.DistributedDataParallel):
            return 0.0
        if not self._is_measuring:
            return None
        # DDP itself reads its timers at the next forward pass; at a row the host waits anyway.
        logger = self.model.logger
        assert logger is not None, "DDP makes it in its constructor"
        logger.set_runtime_stats_and_log()
        data = self.model._get_ddp_logging_data()
        total, hidden = data.get("backward_comm_time"), data.get("backward_compute_comm_overlap_time")
        return None if not total else max(0.0, (int(total) - int(hidden or 0)) * 1e-9)

    def memory_bytes(self) -> dict[str, int]:
        return {
            "weights": tensor_bytes([*self._module.parameters(), *self._module.buffers()]),
            "gradients": tensor_bytes(p.grad for p in self._module.parameters() if p.grad is not None),
        }

    def named_parameters(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self._module.named_parameters() if p.requires_grad}

    def parameter_layout(self) -> ReplicatedLayout:
        return ReplicatedLayout(self.process_group())

    def warm_up(self, step: Callable[[], object]) -> None:
        """Run ``step`` once and drop its gradients."""
        # DDP orders its buckets by the first backward pass, and with them the sums of three processes or more.
        if self.world_size > 1:
            step()
            self._optimizer.zero_grad(set_to_none=True)

    def full_weights(self) -> dict[str, torch.Tensor]:
        if self.rank:
            return {}
        return {name: p.detach().float().cpu().clone() for name, p in self._module.named_parameters()}


def autocast(precision: str, device: torch.device) -> AbstractContextManager[object]:
    """Compute the enclosed code in mixed precision over fp32 weights, for ``precision`` bf16 and fp16."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    return torch.autocast(device.type, dtype=dtype) if dtype else nullcontext()
