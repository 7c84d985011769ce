"""Listen to torch's gradient clipping: which bound was asked for, and which norm it measured."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grad


@dataclass(frozen=True)
class Clipping:
    """One `clip_grad_norm_`.

    Attributes:
        bound: that was asked for; infinite where the loop only wants the norm.
        norm: before clipping.
        is_whole: over every gradient of the loop. Otherwise (clipping by module) the bound says nothing about their
            common norm.
    """

    bound: float
    norm: Tensor
    is_whole: bool


class ClipListener:
    """Keeps every `clip_grad_norm_`.

    All ways into torch's clipping (`torch.nn.utils`, accelerate, the Trainer, a name imported earlier) end in one
    function of `torch.nn.utils.clip_grad`, which is replaced while this listens, by one that calls it.
    """

    def __init__(self) -> None:
        self._heard: list[Clipping] = []
        self._original: Callable[..., Any] = clip_grad._clip_grads_with_norm_

    def start(self, every: Sequence[Tensor]) -> None:
        """Begin to listen.

        Args:
            every: parameters of all optimizers of the loop.
        """
        original = self._original

        def heard(
            parameters: Any, max_norm: float, total_norm: Tensor, foreach: bool | None = None, **other: Any
        ) -> None:
            # The caller may pass a generator, which can be read once.
            clipped = [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)
            members = {id(p) for p in clipped}
            is_whole = all(id(p) in members for p in every if p.grad is not None)
            self._heard.append(Clipping(float(max_norm), total_norm.detach(), is_whole))
            original(clipped, max_norm, total_norm, foreach, **other)

        clip_grad._clip_grads_with_norm_ = heard

    def stop(self) -> None:
        """Put torch's function back."""
        clip_grad._clip_grads_with_norm_ = self._original

    def since(self, count: int) -> tuple[int, Clipping | None]:
        """Return how often torch clipped so far, and the clipping that counts of those after ``count``, if any.

        That is the last one over all gradients: with a finite bound before one that only measures. Only where there is
        none, it is the last one over some of them.

        Args:
            count: what an earlier call returned, so that several optimizers can ask for the same clipping.
        """
        new = self._heard[count:]
        best = max(
            enumerate(new), key=lambda at: (at[1].is_whole, math.isfinite(at[1].bound), at[0]), default=None
        )
        return len(self._heard), best[1] if best else None
