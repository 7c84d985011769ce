"""Bases that are moved on from the last one: a geodesic step on the Grassmannian, or a block power iteration.

Both are generators of `linalg.requests`, and write G for gradients whose rows the basis runs along (a right basis takes
the transposed ones).
"""

from __future__ import annotations

import torch
from torch import Tensor

from optimizers.linalg.requests import AllReduce, Eigh
from optimizers.linalg.subspace import Steps, orthonormal


def geodesic_step(
    gradient: Tensor, basis: Tensor, step: float, rows_split: bool, columns_split: bool
) -> Steps:
    """Move a basis along a geodesic towards the gradient's subspace, in the leading direction of the tangent.

    A = QᵀG,  T = 2(G - QA)Aᵀ ≈ σ u vᵀ,  Q ← Q + (Q v (cos ησ - 1) + u sin ησ) vᵀ. T is minus the derivative of
    ‖G - QQᵀG‖² (SubTrack++, arXiv 2502.01586; A. Edelman, T. Arias and S. Smith, SIAM J. Matrix Anal. 20, 1998, Theorem
    2.3). The result is orthonormalized once, so that rounding does not add up over thousands of steps.

    Args:
        gradient: (b, L, k), this process' rows or columns of it.
        basis: (b, L, r), orthonormal, its rows where rows are split.
        step: η.
        rows_split, columns_split: what this process has of the gradient is a part.

    Returns:
        (b, L, r). Where the gradient lies in the subspace, or is zero, the basis itself.
    """
    projected = yield AllReduce(basis.mT @ gradient, rows_split)
    inside = yield AllReduce(projected @ projected.mT, columns_split)
    outside = yield AllReduce(gradient @ projected.mT, columns_split)
    tangent = (2.0 * (outside - basis @ inside)).double()
    gram = yield AllReduce(tangent.mT @ tangent, rows_split)
    values, vectors = yield Eigh(gram)
    size = values[:, -1].clamp_min(0.0).sqrt()[:, None, None]
    v = vectors[:, :, -1:]
    u = torch.where(size > 0, tangent @ v / torch.where(size > 0, size, 1.0), 0.0)
    wide = basis.double()
    moved = wide + (wide @ v * ((step * size).cos() - 1.0) + u * (step * size).sin()) @ v.mT
    return (yield from orthonormal(moved.to(basis.dtype), rows_split))


def power_step(
    gradient: Tensor, basis: Tensor, moment: Tensor, weight: float, rows_split: bool, columns_split: bool
) -> Steps:
    """Run one block power iteration on B = ρ Q M̂ + (1 - ρ) G from the last basis: Q ← QR(B BᵀQ).

    LDAdam (arXiv 2410.16103), Algorithm 1. BᵀQ = ρ M̂ᵀ + (1 - ρ) GᵀQ, since Q is orthonormal; B itself is not formed.

    Args:
        gradient: (b, L, k), this process' rows or columns of it.
        basis: (b, L, r), orthonormal, its rows where rows are split.
        moment: M̂, (b, r, k), in the coordinates of `basis`.
        weight: ρ.
        rows_split, columns_split: what this process has of the gradient is a part.
    """
    projected = yield AllReduce(basis.mT @ gradient, rows_split)
    coordinates = torch.lerp(projected, moment, weight)
    block = weight * (basis @ (moment @ coordinates.mT)) + (1.0 - weight) * (gradient @ coordinates.mT)
    block = yield AllReduce(block, columns_split)
    once = yield from orthonormal(block, rows_split)
    return (yield from orthonormal(once, rows_split))
