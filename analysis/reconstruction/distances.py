"""Distances between two sets of images, and what of a set each image is nearest to."""

from __future__ import annotations

import torch
from torch import Tensor


def nearest(of: Tensor, among: Tensor) -> tuple[Tensor, Tensor]:
    """(n,) Euclidean distance of each row of `of` (n, d) to the nearest row of `among` (m, d), and its index."""
    found = torch.cdist(of, among, compute_mode="donot_use_mm_for_euclid_dist").min(dim=1)
    return found.values, found.indices


def correlations(of: Tensor, among: Tensor) -> Tensor:
    """(n, m): normalized cross-correlation of each pair, over pixels; 0 for images of one value."""
    return _standard(of) @ _standard(among).T / of.shape[1]


def hausdorff(a: Tensor, b: Tensor) -> float:
    """max over both sets of the distance to the other."""
    return float(torch.maximum(nearest(a, b)[0].max(), nearest(b, a)[0].max()))


def _standard(x: Tensor) -> Tensor:
    centred = x - x.mean(1, keepdim=True)
    spread = centred.square().mean(1, keepdim=True).sqrt()
    return torch.where(spread > 0, centred / spread.clamp_min(torch.finfo(x.dtype).tiny), 0.0)
