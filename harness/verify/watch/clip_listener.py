"""Listen to torch's gradient clipping: which bound was asked for, and which norm it measured."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.nn.utils import clip_grad


class ClipListener:
    """Keeps the bound and the norm of the last `clip_grad_norm_`.

    All ways into torch's clipping (`torch.nn.utils`, accelerate, the Trainer, a name imported earlier) end in one
    function of `torch.nn.utils.clip_grad`, which is replaced while this listens, by one that calls it.
    """

    def __init__(self) -> None:
        self._last: tuple[float, Tensor] | None = None
        self._count = 0
        self._original: Callable[..., Any] = clip_grad._clip_grads_with_norm_

    def start(self) -> None:
        """Begin to listen."""
        original = self._original

        def heard(
            parameters: Any, max_norm: float, total_norm: Tensor, foreach: bool | None = None, **other: Any
        ) -> None:
            self._last = float(max_norm), total_norm.detach()
            self._count += 1
            original(parameters, max_norm, total_norm, foreach, **other)

        clip_grad._clip_grads_with_norm_ = heard

    def stop(self) -> None:
        """Put torch's function back."""
        clip_grad._clip_grads_with_norm_ = self._original

    def since(self, count: int) -> tuple[int, tuple[float, Tensor] | None]:
        """Return how often torch clipped so far, and (bound, norm before) of the last time if it is after ``count``.

        Args:
            count: what an earlier call returned, so that several optimizers can ask for the same clipping.
        """
        return self._count, self._last if self._count > count else None
