"""Steps whose loss jumps are left out: one bad batch must not throw a run off."""

from __future__ import annotations

import math

import torch

from harness.engines import Engine

_KEEP = 0.98
"""Weight of the past in the running mean: about the last 50 steps."""


class SpikeGuard:
    """Voids the gradient of a step whose training loss lies more than ``rise`` above its running mean.

    What happens then is what happens to a non-finite gradient: the step is masked on all processes, leaves weights
    and state untouched, and is counted. Costs one small reduction a step; the host does not wait.

    Args:
        engine: of the run.
        rise: nats per token.
    """

    def __init__(self, engine: Engine, rise: float) -> None:
        self._engine, self._rise = engine, rise
        self._mean = torch.full((), math.inf, dtype=torch.float64, device=engine.device)

    def check(self, loss: torch.Tensor, tokens: int) -> None:
        """After the backward pass of a step (a collective).

        Args:
            loss: this process' loss sum, nats, 0-dim.
            tokens: that carry loss, of all processes.
        """
        loss = self._engine.sum(loss.double()) / tokens
        is_spike = loss > self._mean + self._rise
        self._engine.void_gradients(is_spike)
        followed = torch.where(torch.isfinite(self._mean), torch.lerp(loss, self._mean, _KEEP), loss)
        self._mean = torch.where(is_spike | ~torch.isfinite(loss), self._mean, followed)

    def state(self) -> float | None:
        """The running mean; None before the first step. Waits for the device."""
        mean = self._mean.item()
        return mean if math.isfinite(mean) else None

    def restore(self, mean: float | None) -> None:
        """Go on from it."""
        if mean is not None:
            self._mean.fill_(mean)
