"""An exact KKT network in closed form: the fixture on which every statement about alternatives is exact.

Bias-free two-layer network for two classes. u± is the hard-margin vector of one class alone, min ‖u‖² with
u·xᵢ ≥ 1 there, u± = Σ μᵢxᵢ. Where u₊·x < 0 on all negatives and u₋·x < 0 on all positives, the neurons
wⱼ = cⱼu±/√‖u±‖, vⱼ = ±cⱼ√‖u±‖ with Σcⱼ² = 1 per sign and λᵢ = μᵢ/‖u±‖ satisfy every KKT condition of
min ½‖θ‖² s.t. yᵢΦ(xᵢ) ≥ 1, and ‖θ‖² = 2(‖u₊‖ + ‖u₋‖). (Derived here; tests/analysis/reconstruction.)
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import nnls
from torch import Tensor

from analysis.reconstruction.network import Network
from harness.errors import InputError


@dataclass(frozen=True)
class ClosedForm:
    """The network, its multipliers λ (n, 1) in the order of the images, and u₊, u₋ (d,)."""

    network: Network
    lambdas: Tensor
    directions: tuple[Tensor, Tensor]


def hard_margin(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Solve min ‖u‖² s.t. u·xᵢ ≥ 1 for u (d,) and μ (n,), by one non-negative least squares.

    a = argmin_{a≥0} ‖Xᵀa‖² + (1 − Σa)² has Xᵀa ∝ u: the point of the hull of the images next to 0, up to
    scale; μ = a/(1 − Σa).

    Raises:
        ValueError: no such u: 0 is in the convex hull of the images.
    """
    stacked = np.vstack([images.T, np.ones(len(images))])
    target = np.zeros(len(stacked))
    target[-1] = 1.0
    a, _ = nnls(stacked, target, maxiter=100 * len(images))
    slack = 1.0 - a.sum()
    if slack <= 1e-9:
        raise ValueError("0 is in the convex hull")
    mu = _polished(images, a / slack)
    return images.T @ mu, mu


def _polished(images: np.ndarray, mu: np.ndarray) -> np.ndarray:
    """Solve once more exactly on the support, so that the margins there are 1 to rounding."""
    support = np.flatnonzero(mu > 1e-12 * mu.max())
    exact, *_ = np.linalg.lstsq(images[support] @ images[support].T, np.ones(len(support)), rcond=None)
    if (exact < 0).any():
        return mu
    better = np.zeros_like(mu)
    better[support] = exact
    return better


def build(images: np.ndarray, labels: np.ndarray, neurons: int) -> ClosedForm:
    """Build the network for images (n, d) with labels ±1 and `neurons` hidden units (an even number).

    Raises:
        InputError: the two classes do not meet the condition.
    """
    vectors, lambdas = [], np.zeros(len(images))
    for sign in (1.0, -1.0):
        own, other = images[labels == sign], images[labels != sign]
        try:
            u, mu = hard_margin(own)
        except ValueError as error:
            raise _unfit(f"class {sign:+g}: {error}") from None
        if (other @ u >= 0).any():
            raise _unfit(f"the margin vector of class {sign:+g} does not exclude the other class")
        lambdas[labels == sign] = mu / np.linalg.norm(u)
        vectors.append(u)
    half = neurons // 2
    # Unequal shares, so that no two neurons are the same: 1, 2, … over their root sum of squares.
    shares = np.arange(1.0, half + 1)
    shares /= np.linalg.norm(shares)
    rows, head = [], []
    for sign, u in zip((1.0, -1.0), vectors):
        root = np.sqrt(np.linalg.norm(u))
        rows.append(shares[:, None] * u / root)
        head.append(sign * shares * root)
    network = Network((torch.from_numpy(np.vstack(rows)), torch.from_numpy(np.concatenate(head))[None, :]))
    directions = torch.from_numpy(vectors[0]), torch.from_numpy(vectors[1])
    return ClosedForm(network, torch.from_numpy(lambdas).unsqueeze(1), directions)


def _unfit(why: str) -> InputError:
    return InputError(
        "classes",
        "these two",
        f"have no closed-form network with these images ({why})",
        allowed="35 of the 45 pairs of digits with per_class=15",
        fix="classes=[0,4]",
    )
