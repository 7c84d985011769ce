"""What the training images span, and what of the first layer lies outside."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from analysis.reconstruction.multipliers import KINK
from analysis.reconstruction.network import Network, forward

DIRECTIONS = 16
DEAD = 1e-12
_ROUNDING = 1e-14


@dataclass(frozen=True)
class Span:
    """Orthonormal bases of span{xᵢ} (r, d) and of its complement (d − r, d), and the dead pixels.

    Attributes:
        inside, outside: rows are basis vectors.
        dead: (d,) bool: coordinates that are 0 in every image.
    """

    inside: Tensor
    outside: Tensor
    dead: Tensor

    @property
    def rank(self) -> int:
        """Dimension of the span."""
        return self.inside.shape[0]


def span(x: Tensor) -> Span:
    """Of the rows of x (n, d); the rank is numpy's: singular values above max(n, d)·eps·σ₁."""
    _, sigma, v = torch.linalg.svd(x, full_matrices=True)
    cut = sigma[0] * max(x.shape) * torch.finfo(x.dtype).eps
    rank = int((sigma > cut).sum())
    return Span(v[:rank], v[rank:], x.abs().amax(0) <= DEAD)


def outside_share(weight: Tensor, where: Span) -> float:
    """‖W P_⊥‖/‖W‖ for W (h, d): 0 where every row is a combination of images."""
    size = weight.norm()
    return float((weight @ where.outside.T).norm() / size) if size > 0 else 0.0


def without(network: Network, basis: Tensor) -> Network:
    """The network without the part of its first layer along the orthonormal rows of `basis` (k, d)."""
    first = network.weights[0]
    return network.with_first(first - first @ basis.T @ basis)


def split_radii(network: Network, x: Tensor, basis: Tensor, seed: int) -> Tensor:
    """(n,): how far each image can be moved along directions of `basis` before a gate of layer 1 changes.

    min over neurons of |h_j|/|w_j·ν|, kinked pairs left out (there the gate is free), the median over
    `DIRECTIONS` random unit directions ν. Infinite where ν is orthogonal to every neuron.

    Args:
        network: scaled to a least margin of 1.
        basis: (k, d) orthonormal rows.
    """
    if not basis.shape[0]:
        return torch.zeros(len(x), dtype=x.dtype)
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(DIRECTIONS, basis.shape[0], generator=generator, dtype=x.dtype)
    directions = mixed / mixed.norm(dim=1, keepdim=True) @ basis
    h = forward(network, x).hidden[0].abs()
    room = h.masked_fill(h < KINK, torch.inf)
    weight = network.weights[0]
    moved = (directions @ weight.T).abs()
    # What is rounding of an orthogonal direction is 0, and the radius infinite.
    moved = moved.masked_fill(moved <= _ROUNDING * weight.norm(dim=1), 0.0)
    # 0/0 cannot occur: kinked pairs are infinite.
    return (room.unsqueeze(1) / moved.unsqueeze(0)).amin(-1).median(dim=1).values
