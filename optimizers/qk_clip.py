"""QK-clip: scale the query and key projections of heads whose attention logits grew too large (`qk_clip_threshold`).

Kimi K2 (arXiv 2507.20534, §2.1): after a step, for each head with S = max qᵀk/√d > τ over the batch, W_q and W_k are
multiplied by (τ/S)^½ each, so that the logits of that head shrink by τ/S and those of others do not change. What heads
share is left alone, and the query takes the whole factor, as the paper does with MLA's shared rotary key; with
grouped-query attention that is the key head (derived).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from optimizers.hooks import UnitParts, masks_of
from optimizers.interfaces import MatrixRef, parameter_shape
from optimizers.skipping import StepMask


class HeadLogits(NamedTuple):
    """What one projection is clipped by.

    Attributes:
        largest: (heads,) largest logit of each head over the global batch, equal on all processes, on the weights'
            device. The projection's rows are the heads, in order, of equal length.
        exponent: power of τ/S that this projection takes: 1/2, or 1 where its counterpart is shared.
    """

    largest: Tensor
    exponent: float


class QueryKeyClip:
    """The `StepHook` of `qk_clip_threshold`.

    Attributes:
        logits: id of a projection's weight → what it is clipped by in the next step.
    """

    def __init__(self) -> None:
        self.logits: dict[int, HeadLogits] = {}

    def allocate(self, parts: UnitParts) -> None:
        """Do nothing: it has no state."""

    def before(self, parts: UnitParts, mask: StepMask) -> None:
        """Do nothing: the logits are those of the forward pass."""

    def after(self, parts: UnitParts, stepped: Sequence[Tensor], mask: StepMask) -> None:
        """Scale the rows here of each clipped projection. Nothing crosses ranks: all have the same logits."""
        threshold = parts.options.get("qk_clip_threshold")
        if threshold is None or not self.logits:
            return
        matrices = [m for m in parts.matrices if id(m.parameter) in self.logits]
        if not matrices:
            return
        device = self.logits[id(matrices[0].parameter)].largest.device
        masked = masks_of(matrices, stepped, mask, device)
        for position, matrix in enumerate(matrices):
            factors = head_factors(self.logits[id(matrix.parameter)], threshold)
            if masked is not None:
                # A product with 1 keeps every bit.
                factors = torch.where(masked[position] if masked.ndim else masked, 1.0, factors)
            weight = matrix.view.held(matrix.parameter, matrix.block)
            weight.mul_(_of_elements(matrix, factors, weight).to(weight.dtype))


def head_factors(logits: HeadLogits, threshold: float) -> Tensor:
    """Return (heads,) fp32 factors min(1, τ/S)^exponent; 1 where the logit is not finite."""
    largest = logits.largest.float()
    factors = (threshold / largest.clamp_min(threshold)) ** logits.exponent
    return torch.where(torch.isfinite(largest), factors, 1.0)


def _of_elements(matrix: MatrixRef, factors: Tensor, weight: Tensor) -> Tensor:
    """Return factors that broadcast over the weights that this process holds of a matrix.

    Args:
        matrix: a projection, or one head of it.
        factors: (heads,) of the whole projection.
        weight: (rows, columns) here, or 1-D elements of its rows, which may begin and end within one.
    """
    block, view = matrix.block, matrix.view
    rows = factors.repeat_interleave(parameter_shape(matrix.parameter)[0] // len(factors))
    if block.dim == 0:
        rows = rows[block.start : block.start + block.length]
    if weight.ndim == 1:
        # Of a flat slice: `piece` is (first element, end) of the flattened matrix.
        first = getattr(view, "piece", (0, 0))[0]
        elements = torch.arange(first, first + weight.numel(), device=weight.device)
        return rows[elements // block.shape[1]]
    if view.split == 0:
        rows = rows[view.start : view.start + weight.shape[0]]
    return rows[:, None]
