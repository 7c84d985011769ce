"""Loss scaling, clipping, and skipping of steps with non-finite gradients, for engines that hold their gradients."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
import torch.distributed as dist
from torch import nn

from harness.config.schema import RunConfig
from harness.engines.base import ProcessEngine
from harness.tracked_optimizer import tracked


class SkipStepEngine(ProcessEngine):
    """Steps of an optimizer over gradients that this process holds whole or in part (`_local_gradients`).

    Whether a step counts is a number on the device: the host does not wait for it. Loss scaling and the
    optimizer step are ours because Accelerate's wrappers refuse fp16 on CPUs and decide on the host whether a
    step is skipped.
    """

    def __init__(self, config: RunConfig, *, needs_group: bool = False) -> None:
        super().__init__(config, needs_group=needs_group)
        self._scaler = torch.amp.GradScaler(self.device.type, enabled=config.precision == "fp16")
        self._optimizer: torch.optim.Optimizer
        self._parameters: list[nn.Parameter] = []

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradients of this micro-batch's loss, scaled under fp16."""
        self._scaler.scale(loss).backward()

    def force_skip(self, where: torch.Tensor) -> None:
        """Make the next step skip its update where a flag is set; under fp16 it counts as an overflow."""
        set_nonfinite(self._local_gradients(), where)

    def step(self, max_norm: float | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Clip, then step; see `harness.protocols.Engine.step`."""
        norm, nonfinite = self.clip(max_norm)
        self.update(nonfinite)
        return norm, nonfinite

    def clip(self, max_norm: float | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Unscale and clip the reduced gradients.

        Returns:
            The global gradient norm before clipping, and 1.0 where it is not finite (else 0.0): 0-dim fp32
            tensors on `device`, equal on all processes.
        """
        if self._scaler.is_enabled():
            self._scaler.unscale_(self._optimizer)
        gradients = self._local_gradients()
        # fp32 accumulation and result: a norm rounded to bf16 would be off by up to 0.4 %.
        norms = torch._foreach_norm(gradients, 2, dtype=torch.float32)  # pyright: ignore[reportPrivateImportUsage]
        norm = self._total_norm(torch.linalg.vector_norm(torch.stack(norms)))
        nonfinite = (~torch.isfinite(norm)).float()
        if max_norm is not None:
            # A non-finite norm gives a useless factor, but then the update is skipped anyway.
            factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
            torch._foreach_mul_(gradients, factor)  # pyright: ignore[reportPrivateImportUsage]
        return norm, nonfinite

    def update(self, nonfinite: torch.Tensor) -> None:
        """Make one optimizer step that leaves weights and state untouched where ``nonfinite`` is 1.0."""
        # Ours, and torch's fused ones: they read `found_inf` on the device.
        if tracked(self._optimizer).reads_found_inf:
            self._optimizer.found_inf = nonfinite  # pyright: ignore[reportAttributeAccessIssue]
            self._apply()
        elif not nonfinite.item():
            # A plug-in without torch's AMP protocol: the host has to decide, which waits for the device.
            self._apply()
        if self._scaler.is_enabled():
            self._scaler.update()

    def undo_step_counters(self) -> None:
        """Take back the host's counters of the last step, which was skipped on the device."""
        tracked(self._optimizer).retract_step()

    def scaler_state(self) -> dict[str, float]:
        """Return the state of `torch.amp.GradScaler`."""
        return self._scaler.state_dict()

    def load_scaler_state(self, state: Mapping[str, float]) -> None:
        """Continue from the loss scale of a run in the same precision, on whichever engine."""
        if state and self._scaler.is_enabled():
            self._scaler.load_state_dict(dict(state))

    def _apply(self) -> None:
        self._optimizer.step()

    def _local_gradients(self) -> list[torch.Tensor]:
        """Return the gradients as this process holds them, one tensor a parameter."""
        return [p.grad for p in self._parameters if p.grad is not None]

    def _total_norm(self, local: torch.Tensor) -> torch.Tensor:
        """Return the global gradient norm from that of `_local_gradients`: the same where these are whole."""
        return local


def set_nonfinite(gradients: Iterable[torch.Tensor], where: torch.Tensor) -> None:
    """Multiply the first element of each tensor, whatever its strides, by NaN where ``where`` is true, else by 1."""
    factor = torch.where(where, math.nan, 1.0)
    by_dtype: dict[torch.dtype, list[torch.Tensor]] = {}
    for gradient in gradients:
        if gradient.numel():
            by_dtype.setdefault(gradient.dtype, []).append(gradient[(0,) * gradient.ndim])
    for dtype, elements in by_dtype.items():
        # On CUDA only a factor of their own dtype lets one kernel take all of them.
        torch._foreach_mul_(elements, factor.to(dtype))  # pyright: ignore[reportPrivateImportUsage]


def root_sum_square(local: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """Return √(Σ x²) over the processes of a group (a collective)."""
    # In fp64: squares of fp32 norms beyond 1.8e19 overflow fp32.
    square = local.double().square()
    dist.all_reduce(square, group=group)
    return square.sqrt().float()
