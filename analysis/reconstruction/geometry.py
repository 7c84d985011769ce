"""Norms of parameters, their duals, and how well u = Σ λᵢcᵢ∇Φ is aligned with θ in each.

Steepest descent in a norm ‖·‖ ends at a KKT point of min ½‖θ‖² in that norm (Tsilivis et al. 2024, arXiv
2410.22069): u lies in the subdifferential of ½‖·‖² at θ, so that ⟨θ, u⟩ = ‖θ‖·‖u‖_* exactly there. The
alignment a = ⟨θ, u⟩ / (‖θ‖·‖u‖_*) ∈ [0, 1] measures how nearly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

NORMS = ("l2", "spectral", "linf", "hybrid")
_FLOOR = 1e-28
"""Relative floor of squared singular values: below, they count as zero."""


@dataclass(frozen=True)
class Geometry:
    """A norm of all parameters together.

    Attributes:
        norm: "l2"; "linf"; "spectral": max_l ‖W_l‖_op, a bias counting as a column; "hybrid": the largest of
            ‖W_l‖_op/sₗ over hidden matrices and ‖·‖_∞/s over head and bias.
        scales: s of each parameter in "hybrid": how far one step of the optimizer moves it. 1 if empty.
    """

    norm: str
    scales: tuple[float, ...] = ()

    def pieces(self, parts: Sequence[Tensor], depth: int) -> list[tuple[str, float]]:
        """("l2" | "spectral" | "linf", scale) of each parameter."""
        scales = self.scales or (1.0,) * len(parts)
        if self.norm != "hybrid":
            return [(self.norm, 1.0)] * len(parts)
        return [("spectral" if i < depth - 1 else "linf", s) for i, s in enumerate(scales)]


def norm(geometry: Geometry, parts: Sequence[Tensor], depth: int) -> Tensor:
    """‖θ‖ (…) over the last one (bias) or two dimensions of each part."""
    if geometry.norm == "l2":
        return _squares(parts, depth).sqrt()
    pieces = geometry.pieces(parts, depth)
    found = [_one_norm(kind, part, i < depth) / s for i, (part, (kind, s)) in enumerate(zip(parts, pieces))]
    return torch.stack(found).amax(0)


def dual(geometry: Geometry, parts: Sequence[Tensor], depth: int) -> Tensor:
    """‖u‖_* (…), differentiable: its gradient is the maximizer of ⟨u, ·⟩ on the unit ball.

    Dual of a maximum is a sum: Σ sₗ·(nuclear or ℓ₁ norm).
    """
    if geometry.norm == "l2":
        return _squares(parts, depth).sqrt()
    pieces = geometry.pieces(parts, depth)
    found = [_one_dual(kind, part, i < depth) * s for i, (part, (kind, s)) in enumerate(zip(parts, pieces))]
    return torch.stack(found).sum(0)


def alignment(geometry: Geometry, theta: Sequence[Tensor], found: Sequence[Tensor], depth: int) -> Tensor:
    """a (…) = ⟨θ, u⟩ / (‖θ‖·‖u‖_*)."""
    inner = _inner(theta, found, depth)
    scale = norm(geometry, theta, depth) * dual(geometry, found, depth)
    return inner / scale.clamp_min(torch.finfo(inner.dtype).tiny)


def polar(matrix: Tensor) -> Tensor:
    """UVᵀ of the singular value decomposition without directions of singular value 0: (…, m, n).

    By the eigenvalues of the smaller Gram matrix, which keeps batches of tall matrices cheap; singular values
    below 1e-14 of the largest count as 0.
    """
    if matrix.shape[-2] < matrix.shape[-1]:
        return polar(matrix.mT).mT
    values, vectors = torch.linalg.eigh(matrix.mT @ matrix)
    # The Gram matrix knows squares to a relative 1e-16: what lies below is rounding.
    cut = values[..., -1:].clamp_min(_FLOOR) * (matrix.shape[-1] * torch.finfo(matrix.dtype).eps)
    root = torch.where(values > cut, values.clamp_min(_FLOOR).rsqrt(), 0.0)
    return matrix @ (vectors * root.unsqueeze(-2)) @ vectors.mT


def _squares(parts: Sequence[Tensor], depth: int) -> Tensor:
    return torch.stack([_sum(part.square(), i < depth) for i, part in enumerate(parts)]).sum(0)


def _inner(theta: Sequence[Tensor], found: Sequence[Tensor], depth: int) -> Tensor:
    return torch.stack([_sum(t * u, i < depth) for i, (t, u) in enumerate(zip(theta, found))]).sum(0)


def _sum(values: Tensor, is_matrix: bool) -> Tensor:
    return values.sum((-2, -1)) if is_matrix else values.sum(-1)


def _one_norm(kind: str, part: Tensor, is_matrix: bool) -> Tensor:
    if kind == "linf":
        return part.abs().amax((-2, -1) if is_matrix else -1)
    return torch.linalg.matrix_norm(part, 2) if is_matrix else torch.linalg.vector_norm(part, dim=-1)


def _one_dual(kind: str, part: Tensor, is_matrix: bool) -> Tensor:
    if kind == "linf":
        return _sum(part.abs(), is_matrix)
    if not is_matrix:
        return torch.linalg.vector_norm(part, dim=-1)
    with torch.no_grad():
        direction = polar(part)
    # ⟨U, polar(U)⟩ is the nuclear norm, and with polar(U) held it has the nuclear norm's gradient, polar(U).
    return _sum(part * direction, True)
