"""Is an update any function of the momentum's singular values? If so, which."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

SMOOTH, UNKNOWN = "smooth cut", "unknown"
MIXED = 0.05
"""Share of an update outside of the momentum's singular pairs, above which it is no function of its singular values."""
LIKE = 0.03


class Profile(NamedTuple):
    """What an update makes of each singular value of the momentum.

    Attributes:
        values: singular values, descending, relative to the largest.
        images: what they become, relative to the largest image.
        mixed: share of the update (of its Frobenius norm) that no function of the singular values explains.
    """

    values: Tensor
    images: Tensor
    mixed: float


def profile(update: Tensor, moment: Tensor) -> Profile:
    """Return the profile of an (m, n) update without weight decay, along the singular vectors of the momentum."""
    u, values, vt = torch.linalg.svd(moment.double(), full_matrices=False)
    core = u.mT @ update.double() @ vt.mT
    images = core.diagonal().clone()
    size = float(update.double().norm())
    outside = max(size**2 - float(images.square().sum()), 0.0) ** 0.5
    return Profile(values / values[0], images / images.abs().max(), outside / size)


def kind(found: Profile) -> str | None:
    """Return SMOOTH for σ²/(σ² + cut²), UNKNOWN for another increasing function that ends flat, else None."""
    if found.mixed > MIXED:
        return None
    values, images = found.values, found.images.clamp(1e-6, 1 - 1e-6)
    # Relative to the image of σ = 1, f = σ²(1 + c²)/(σ² + c²). So b = σ²(1/f - 1)/(1 - σ²) = c²/(1 + c²) is one and the
    # same for all σ that are damped visibly.
    damped = (images > 0.05) & (images < 0.95) & (values < 1)
    if int(damped.sum()) >= 2:
        squares = values.square()
        b = (squares * (1 / images - 1) / (1 - squares))[damped].median()
        cut = b / (1 - b)
        expected = values.square() / (values.square() + cut)
        expected = expected / expected.max()
        if float((expected - found.images).abs().max()) < LIKE:
            return SMOOTH
    # Orthogonalizing lifts small singular values against large ones; a multiple of the momentum does not.
    lifted = found.images > 1.5 * values
    return UNKNOWN if bool(lifted[len(lifted) // 2 :].any()) and float(found.images.min()) > -LIKE else None
