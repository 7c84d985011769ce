"""How updates reach the weights: decay, learning rate, rounding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from optimizers.interfaces import LowRank, MatrixBatch, gradient_of
from optimizers.rounding import Rounding, compensated, rounded

_T = TypeVar("_T")
Factors = float | Tensor | list[Tensor]
"""Of weights: one for all, one for each of them (b, 1, 1), or of each its elements'."""


@dataclass(frozen=True)
class ApplyConfig:
    """How an update Δ reaches the weights: W ← (1 - lr·wd)·W - lr·Δ.

    Attributes:
        lr: learning rate of this step; a 0-dim tensor is taken too.
        weight_decay: decoupled.
        decay_last: the decay multiplies the weight after the step instead of before.
        rounding: how half-precision weights take the fp32 result.
        cautious: only elements decay whose Δ does not have the opposite sign.
    """

    lr: float | Tensor
    weight_decay: float
    decay_last: bool
    rounding: Rounding
    cautious: bool = False

    @property
    def decays_by_element(self) -> bool:
        """Return True if what decays depends on the update."""
        return self.cautious and self.weight_decay != 0


def apply_update(batch: MatrixBatch, delta: Tensor | LowRank, config: ApplyConfig) -> None:
    """Update the weights of a batch (this process' part of them); Δ may be overwritten.

    Args:
        batch: whose weights.
        delta: (b, m, n) in the batch's dtype, or its factors.
        config: learning rate, decay, rounding.
    """
    lr, weight_decay = config.lr, config.weight_decay
    weights = [m.weight() for m in batch.matrices]
    if isinstance(delta, LowRank):
        if _in_place(batch, weights) and not config.decays_by_element:
            _apply_factors(batch, weights, delta, config)
            return
        delta = delta.dense(batch)
    mask = batch.masked
    if mask is not None and mask.ndim:
        mask = mask[:, None, None]
    if mask is not None:
        # Not a product: a masked step usually holds NaN, and NaN·0 is NaN.
        delta = torch.where(mask, 0.0, delta)
    decay: float | Tensor = 1.0 - lr * weight_decay
    if mask is not None and weight_decay:
        decay = torch.where(mask, torch.ones((), dtype=batch.dtype, device=delta.device), decay)
    if weights[0].dtype != batch.dtype:
        _apply_to_half(batch, weights, delta, decay if weight_decay else None, config)
        return
    deltas = [m.block.like_view(d) for m, d in zip(batch.matrices, delta.unbind(0))]
    descend(stepped(batch, weights), stepped(batch, deltas), config, decay)


def stepped(batch: MatrixBatch, values: Sequence[_T]) -> list[_T]:
    """Return the values (one for each matrix) of the matrices that take the step, as far as the host knows."""
    return [value for position, value in enumerate(values) if position not in batch.skipped]


def descend(
    weights: list[Tensor], deltas: list[Tensor], config: ApplyConfig, decay: float | Tensor | None = None
) -> None:
    """Apply W ← decay·W - lr·Δ for tensors of any shape, of one dtype; Δ may be overwritten.

    Args:
        weights: to be changed.
        deltas: of their shapes.
        config: learning rate and order.
        decay: factor on the weights, or one for each along its first axis; None: what `config` says.
    """
    if not weights:
        return
    lr = config.lr
    factors: Factors = 1.0 - lr * config.weight_decay if decay is None else decay
    if config.decays_by_element:
        factors = [
            agreeing(weight, delta, factor)
            for weight, delta, factor in zip(weights, deltas, _each(factors, weights))
        ]
    if config.weight_decay and not config.decay_last:
        _decay(weights, factors)
    if isinstance(lr, Tensor):
        torch._foreach_mul_(deltas, lr)  # pyright: ignore[reportPrivateImportUsage]
        lr = 1.0
    torch._foreach_add_(weights, deltas, alpha=-lr)  # pyright: ignore[reportPrivateImportUsage]
    if config.weight_decay and config.decay_last:
        _decay(weights, factors)


def _decay(weights: list[Tensor], factors: Factors) -> None:
    if isinstance(factors, Tensor) and factors.ndim:
        factors = list(factors.reshape(-1).unbind(0))
    if isinstance(factors, list):
        for weight, factor in zip(weights, factors):
            weight.mul_(factor)
        return
    torch._foreach_mul_(weights, factors)  # pyright: ignore[reportPrivateImportUsage]


def _each(factors: Factors, weights: Sequence[Tensor]) -> Sequence[float | Tensor]:
    if isinstance(factors, Tensor) and factors.ndim:
        return factors.reshape(-1).unbind(0)
    return factors if isinstance(factors, list) else [factors] * len(weights)


def agreeing(weight: Tensor, delta: Tensor, factor: float | Tensor) -> Tensor:
    """Return `factor` where the update does not push the weight away from zero, else 1 (cautious weight decay).

    Chen et al. 2025, arXiv 2510.12402: the decay of an element counts where u·w ≥ 0. Signs are compared, because the
    product of two small numbers may underflow.
    """
    agrees = torch.sign(weight) * torch.sign(delta) >= 0
    decayed = factor.to(delta) if isinstance(factor, Tensor) else delta.new_full((), factor)
    return torch.where(agrees, decayed, 1.0)


def _in_place(batch: MatrixBatch, weights: Sequence[Tensor]) -> bool:
    """Return True if factors are multiplied straight into the weights.

    On a CPU that saves two passes over memory; on a GPU it would cost a launch per matrix.
    """
    return (
        batch.masked is None
        and weights[0].device.type == "cpu"
        and weights[0].dtype == batch.dtype
        and weights[0].ndim == 2
    )


def _apply_factors(batch: MatrixBatch, weights: list[Tensor], delta: LowRank, config: ApplyConfig) -> None:
    lr = float(config.lr)
    decay = 1.0 - lr * config.weight_decay
    weights = stepped(batch, weights)
    if not weights:
        return
    if decay != 1.0 and not config.decay_last:
        torch._foreach_mul_(weights, decay)  # pyright: ignore[reportPrivateImportUsage]
    keep = delta.keep
    if isinstance(keep, Tensor):
        matrices = stepped(batch, batch.matrices)
        for weight, matrix, factor in zip(weights, matrices, stepped(batch, keep.unbind(0))):
            weight.addcmul_(gradient_of(matrix).to(batch.dtype), factor, value=-lr)
    elif keep:
        gradients = [gradient_of(m).to(batch.dtype) for m in stepped(batch, batch.matrices)]
        torch._foreach_add_(weights, gradients, alpha=-lr * keep)  # pyright: ignore[reportPrivateImportUsage]
    lefts, rights = stepped(batch, delta.left.unbind(0)), stepped(batch, delta.right.unbind(0))
    for weight, left, right in zip(weights, lefts, rights):
        if left.shape[-1]:  # else there is nothing but the gradient
            weight.addmm_(left, right, alpha=-lr)
    if decay != 1.0 and config.decay_last:
        torch._foreach_mul_(weights, decay)  # pyright: ignore[reportPrivateImportUsage]


def _apply_to_half(
    batch: MatrixBatch,
    weights: Sequence[Tensor],
    delta: Tensor,
    decay: float | Tensor | None,
    config: ApplyConfig,
) -> None:
    """Update half-precision weights in fp32, from one fp32 copy of the batch, and round once."""
    blocks = [matrix.block for matrix in batch.matrices]
    shape = delta.shape[1:]
    old = torch.stack([weight.reshape(shape) for weight in weights])
    wide = old.to(delta.dtype)
    lr, decay_last, rounding = config.lr, config.decay_last, config.rounding
    if decay is not None and config.cautious:
        decay = agreeing(wide, delta, decay)
    start = wide if decay is None or decay_last else wide * decay
    new = start - lr * delta
    if decay is not None and decay_last:
        new = new * decay
    if rounding.mode == "kahan":
        result, compensation = compensated(old, new - wide, batch.state["compensation"])
        batch.commit("compensation", compensation)
    else:
        # Shards of one matrix must not all round by the same bits.
        name = f"{batch.names[0]}@{batch.start}" if batch.start else batch.names[0]
        result = rounded(new, old.dtype, rounding, name, batch.steps[0])
    if batch.masked is not None:
        mask = batch.masked if batch.masked.ndim == 0 else batch.masked[:, None, None]
        result = torch.where(mask, old, result)
    pairs = [
        (weight, block.like_view(part))
        for i, (weight, block, part) in enumerate(zip(weights, blocks, result.unbind(0)))
        if i not in batch.skipped
    ]
    if pairs:
        torch._foreach_copy_([w for w, _ in pairs], [part for _, part in pairs])  # pyright: ignore[reportPrivateImportUsage]
