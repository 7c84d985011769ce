"""Keep an exponential average of all weights, which evaluation can use (`average_decay`).

A_t = Σ_i (1 - β)β^(t-i) W_i / (1 - β^t), the bias-corrected average of the weights after steps 1 to t, by
A_t = A_(t-1) + (1 - β)/(1 - β^t)·(W_t - A_(t-1)): the first weight counts 1.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from optimizers.hooks import UnitParts
from optimizers.interfaces import MatrixRef, compute_dtype
from optimizers.skipping import StepMask

KIND = "average"
"""Kind of state: as large as the parameter here, fp32 (fp64 for fp64 weights)."""


class WeightAverage:
    """The `StepHook` of `average_decay`."""

    def allocate(self, parts: UnitParts) -> None:
        """Add the averages."""
        if parts.options.get("average_decay") is None:
            return
        for parameter in parts.parameters:
            if KIND not in parts.state[parameter]:
                weight = parts.layout.weight(parameter).detach()
                parts.state[parameter][KIND] = weight.to(compute_dtype(weight), copy=True)

    def before(self, parts: UnitParts, mask: StepMask) -> None:
        """Do nothing: weights are averaged after the step."""

    def after(self, parts: UnitParts, stepped: Sequence[Tensor], mask: StepMask) -> None:
        """Move the averages towards the new weights."""
        beta = parts.options.get("average_decay")
        if beta is None:
            return
        matrices: dict[Tensor, list[MatrixRef]] = {}
        for matrix in parts.matrices if mask.flags else ():
            matrices.setdefault(matrix.parameter, []).append(matrix)
        for parameter in stepped:
            weight = parts.layout.weight(parameter).detach()
            average = parts.state[parameter][KIND]
            share = (1.0 - beta) / (1.0 - beta ** (parts.state[parameter]["step"] + 1))
            masked = _masked(matrices.get(parameter, ()), mask, average)
            if masked is None:
                average.lerp_(weight.to(average.dtype), share)
            else:
                average.lerp_(weight.to(average.dtype), torch.where(masked, 0.0, average.new_full((), share)))


def _masked(matrices: Sequence[MatrixRef], mask: StepMask, like: Tensor) -> Tensor | None:
    """Return True, 0-dim on the device, where nothing of a parameter takes the step; None: the host knows."""
    if mask.everything is not None:
        return mask.everything.to(like.device).reshape(()) > 0
    flags = [mask.flags[m.unit] for m in matrices if m.unit in mask.flags]
    return torch.stack(flags).all() if flags else None


@contextmanager
def averages_in_place(units: Iterable[UnitParts]) -> Iterator[None]:
    """Exchange weights and averages inside the context; both have their own bits again afterwards, also if it fails."""
    pairs = [
        (parts.layout.weight(parameter).detach(), parts.state[parameter][KIND])
        for parts in units
        for parameter in parts.parameters
        if KIND in parts.state[parameter]
    ]
    # Half-precision weights cannot hold an average: they are kept, and the averages stay where they are.
    kept = [weight.clone() if weight.dtype != average.dtype else None for weight, average in pairs]

    def exchange(index: int, *, is_back: bool) -> None:
        (weight, average), own = pairs[index], kept[index]
        if own is None:
            before = weight.clone()
            weight.copy_(average)
            average.copy_(before)
        else:
            weight.copy_(own if is_back else average)

    exchanged = 0
    try:
        for index in range(len(pairs)):
            exchange(index, is_back=False)
            exchanged += 1
        yield
    finally:
        # Memory for a copy may run out halfway.
        for index in range(exchanged):
            exchange(index, is_back=True)
