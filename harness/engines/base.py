"""What the loop asks of an engine, and the table of engines."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from importlib import import_module
from typing import Protocol

import torch
from torch import nn

from harness.config.schema import RunConfig
from harness.engines.holdings import Layout
from optimizers.layouts.layout import Layout as ParameterLayout


class Engine(Protocol):
    """One process' view of the training processes.

    Every process calls every method in the same order: several of them are collectives. In the order of a run:
    `shard`, build the optimizer, `prepare`; then per step `micro_step`, `autocast` and `backward` for each
    micro-batch, and `step`.
    """

    name: str
    layout: Layout
    """How the weights are held when the optimizer steps."""
    rank: int
    world_size: int
    shards: int
    """Processes over which `shard` cuts one copy of the weights; 1 where it does nothing."""
    device: torch.device
    forward_is_local: bool
    """Whether forward passes communicate nothing, so that their time is this process' own."""
    model: nn.Module
    """The model as it must be called in the forward pass."""

    def process_group(self) -> torch.distributed.ProcessGroup | None:
        """The group over which weights are replicated; None for one process, and where weights are cut."""
        ...

    def shard(self, model: nn.Module, axes: Mapping[str, int]) -> None:
        """Cut the model (already on `device`) where the optimizer is to be built on shards; else do nothing.

        Args:
            model: whole, the same on every process.
            axes: parameter name → axis to cut it along; 0 for names that are not in it.
        """
        ...

    def prepare(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Take the model and the optimizer over."""
        ...

    def autocast(self) -> AbstractContextManager[object]:
        """Mixed precision for a forward pass."""
        ...

    def micro_step(self, *, last: bool) -> AbstractContextManager[object]:
        """Around forward and backward of one micro-batch; only the ``last`` one reduces gradients (means)."""
        ...

    def backward(self, loss: torch.Tensor) -> None:
        """Add this micro-batch's gradients."""
        ...

    def void_gradients(self, where: torch.Tensor) -> None:
        """Make the gradient non-finite where ``where`` (0-dim bool, equal on all processes) is true, so that the
        next `step` is masked. Does not wait for the device."""
        ...

    def step(self, max_norm: float | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Unscale and clip the gradients, then one optimizer step.

        It leaves weights and state untouched on all processes where the gradient is not finite anywhere.

        Args:
            max_norm: of the global gradient; None: no clipping.

        Returns:
            The global gradient norm before clipping, and 1.0 where it is not finite (else 0.0): 0-dim fp32
            tensors on `device`, equal on all processes.
        """
        ...

    def retract_step(self) -> None:
        """Take back what the host counted in the last step, which turned out to be masked."""
        ...

    def inference(self) -> AbstractContextManager[nn.Module]:
        """What to call in forward passes without gradients, the same number of times on every process."""
        ...

    def sum(self, value: torch.Tensor) -> torch.Tensor:
        """Sum over the processes (a copy)."""
        ...

    def max(self, value: torch.Tensor) -> torch.Tensor:
        """Maximum over the processes (a copy)."""
        ...

    def vote(self, value: torch.Tensor) -> Callable[[], list[float]]:
        """Start a maximum over the processes; calling the result waits for it. Does not block."""
        ...

    def exposed_communication(self) -> float | None:
        """Seconds of gradient communication in the last step that computation did not hide, where known."""
        ...

    def held_bytes(self) -> dict[str, int]:
        """Bytes of "weights" (buffers and master copies included) and "gradients" that this process holds."""
        ...

    def full_weights(self) -> dict[str, torch.Tensor]:
        """Whole weights by parameter name on rank 0, nothing elsewhere: fp32 copies on the CPU (a collective)."""
        ...

    def bound_waiting(self) -> None:
        """Let no collective wait longer than ``engine.timeout_s``; once everything is prepared."""
        ...

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """The trainable parameters by name, as they are between steps."""
        ...

    def parameter_layout(self) -> ParameterLayout:
        """How the trainable parameters lie on the processes, where the optimizer (a plug-in) does not know."""
        ...

    def weights_were_replaced(self) -> None:
        """Bring along what the engine derives from the weights, after they were overwritten (a collective)."""
        ...

    def rehearse(self, step: Callable[[], object]) -> None:
        """Call ``step`` (forward and backward, gradients of no use) where the engine settles in with its first one, so
        that what follows adds up in the order of a run that is under way (a collective)."""
        ...

    def scaler_state(self) -> dict[str, float]:
        """The loss scale and what decides when it changes; empty without loss scaling."""
        ...

    def load_scaler_state(self, state: Mapping[str, float]) -> None:
        """Go on from that; an empty one changes nothing."""
        ...

    def release(self) -> None:
        """Undo what the engine did to this process, which stays in the process group and may start another one."""
        ...

    def close(self) -> None:
        """Release, wait for the others and leave the process group."""
        ...


_ENGINES = {
    "single": "harness.engines.ddp:ReplicatedEngine",
    "ddp": "harness.engines.ddp:ReplicatedEngine",
    "fsdp2": "harness.engines.fsdp2:ShardedEngine",
    "hsdp": "harness.engines.fsdp2:ShardedEngine",
    "zero0": "harness.engines.deepspeed:UnpartitionedEngine",
    "zero1": "harness.engines.deepspeed:PartitionedEngine",
    "zero2": "harness.engines.deepspeed:PartitionedEngine",
    "zero3": "harness.engines.deepspeed:PartitionedEngine",
}


def start(config: RunConfig) -> Engine:
    """Start this process' part of the engine that ``config.engine`` names (a collective)."""
    module, name = _ENGINES[config.engine.name].split(":")
    return getattr(import_module(module), name)(config)
