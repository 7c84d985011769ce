"""Orthogonal factors over the root of their second moment, and the size of such updates (NorMuon, AdaMuon)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from optimizers.interfaces import MatrixBatch


def scaled_to_rms(b: MatrixBatch, matrices: Tensor) -> Tensor:
    """Scale whole matrices, in place, so that the root mean square of each one's elements is `factor_rms`·α.

    Args:
        b: the batch, with options "factor_rms" and "alpha".
        matrices: (b, m, n); overwritten. A zero matrix stays zero.
    """
    m, n = b.shape
    size = b.options["alpha"] * b.options["factor_rms"] * math.sqrt(m * n)
    norm = torch.linalg.vector_norm(matrices, dim=(-2, -1), keepdim=True)
    return matrices.mul_(size / norm.clamp_min(torch.finfo(norm.dtype).tiny))


def normalized_rows(b: MatrixBatch, factor: Tensor) -> Tensor:
    """Advance the second moment of each output neuron by a factor, and return the factor over its root plus ε.

    Args:
        b: the batch, with state "row_second_moment" (b, ≥ output neurons).
        factor: (b, m, n) of whole matrices; a neuron is a row, or a column where weights are stored as (in, out).
    """
    m, n = b.shape
    across, neurons = (-2, n) if b.matrices[0].block.transposed else (-1, m)
    squares = factor.square().mean(across)
    squares = torch.nn.functional.pad(squares, (0, b.state["row_second_moment"].shape[-1] - neurons))
    second = b.blend("row_second_moment", squares, b.options["beta2"], 1.0 - b.options["beta2"])
    return factor / (second[:, :neurons].sqrt() + b.options["eps"]).unsqueeze(across)


def normalized_elements(b: MatrixBatch, factor: Tensor) -> Tensor:
    """Advance the second moment of each element by a factor (b, m, n), and return the factor over its root plus ε."""
    second = b.blend("second_moment", factor.square(), b.options["beta2"], 1.0 - b.options["beta2"])
    denominator = second.sqrt().add_(b.options["eps"])
    return torch.div(factor, denominator, out=denominator)
