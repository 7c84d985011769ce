"""λ from weights and images: non-negative least squares, with fixed gates and with Clarke gates."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import nnls
from torch import Tensor

from analysis.reconstruction.network import (
    Gates,
    Network,
    flat,
    forward,
    kkt_coefficients,
    label_margins,
    outputs,
    per_sample,
    recomputed,
)

KINK = 1e-3
"""A pre-activation this near 0 (network scaled to a least margin of 1) lies on a kink."""


@dataclass(frozen=True)
class MultiplierFit:
    """min over λ (≥ 0 unless regression) of ‖θ − u(λ)‖.

    Attributes:
        lambdas: (n,).
        residual: ε = ‖θ − u‖/‖θ‖.
    """

    lambdas: Tensor
    residual: float


def gradients(task: str, network: Network, x: Tensor, labels: Tensor, gates: Gates = recomputed) -> Tensor:
    """Return the rows ∇_θ⟨cᵢ, Φ(xᵢ)⟩, (n, p)."""
    c = kkt_coefficients(task, forward(network, x, gates).outputs, labels)
    return per_sample(network, x, c, gates)


def fit(task: str, network: Network, x: Tensor, labels: Tensor, gates: Gates = recomputed) -> MultiplierFit:
    """Return the best λ for these images, by non-negative least squares (regression: least squares).

    Args:
        x: (n, d) float64. labels: (n,).
        gates: of the residual; the network's own, inherited ones, or smoothed.
    """
    columns = gradients(task, network, x, labels, gates).detach().numpy().T
    theta = flat(network.parameters).numpy()
    lambdas = solve(columns, theta, is_free=task == "regression")
    gap = np.linalg.norm(theta - columns @ lambdas) / np.linalg.norm(theta)
    return MultiplierFit(torch.from_numpy(lambdas), float(gap))


def residual(
    task: str, network: Network, x: Tensor, labels: Tensor, lambdas: Tensor, gates: Gates = recomputed
) -> float:
    """Return ‖θ − Σ λᵢ∇⟨cᵢ, Φ(xᵢ)⟩‖/‖θ‖ for given λ (n,)."""
    theta = flat(network.parameters)
    gap = theta - lambdas @ gradients(task, network, x, labels, gates)
    return float(gap.norm() / theta.norm())


def solve(columns: np.ndarray, target: np.ndarray, is_free: bool = False) -> np.ndarray:
    """Return argmin_{λ ≥ 0} ‖target − columns·λ‖ for columns (p, n); `is_free` allows λ of any sign."""
    if is_free:
        return np.linalg.lstsq(columns, target, rcond=None)[0]
    # The triangular factor has n rows in place of p; nothing is squared.
    q, r = np.linalg.qr(columns)
    scale = np.abs(r).max() or 1.0
    solution, _ = nnls(r / scale, q.T @ target, maxiter=max(300, 30 * columns.shape[1]))
    return solution / scale


@dataclass(frozen=True)
class ClarkeFit:
    """The residual where each kinked (image, neuron) pair has a multiplier of its own, c_ij in place of λᵢ.

    Attributes:
        residual: ε with c_ij ≥ 0 only: a lower bound of the Clarke residual.
        upper: ε after clipping to c_ij ≤ λᵢ: an upper bound.
        violation: max (c_ij − λᵢ)/max λ, at least 0.
        kinks, pairs: how many of the (image, neuron) pairs are on a kink.
    """

    residual: float
    upper: float
    violation: float
    kinks: int
    pairs: int


def clarke(network: Network, x: Tensor, labels: Tensor) -> ClarkeFit | None:
    """Return the Clarke residual of a two-layer network with one output; None for others, where gates multiply.

    At a kink wⱼ·xᵢ + bⱼ = 0 the subdifferential of relu is [0, 1], so the multiplier of xᵢ in row j of W₁ may be
    any number of [0, λᵢ].

    Args:
        network: scaled to a least margin of 1.
        x: (n, d). labels: (n,) ±1.
    """
    if network.depth != 2 or network.weights[1].shape[0] != 1:
        return None
    h = forward(network, x).hidden[0]
    kinked = h.abs() < KINK
    gates = ((h > 0) & ~kinked).to(h.dtype)
    # Rows of λ: kinked pairs off in W₁ and b (they have columns of their own); relu(h) as it is in the head.
    base = per_sample(network, x, labels.unsqueeze(-1), lambda h_, layer: (h_.relu(), gates)).numpy()
    image, neuron = (index.numpy() for index in kinked.nonzero(as_tuple=True))
    width, d = network.weights[0].shape
    own = np.zeros((len(image), base.shape[1]))
    factors = (labels[image] * network.weights[1][0][neuron]).numpy()
    rows = np.arange(len(image))
    for k in range(d):
        own[rows, neuron * d + k] = factors * x[image, k].numpy()
    if network.bias is not None:
        own[rows, base.shape[1] - width + neuron] = factors
    columns = np.vstack([base, own]).T
    theta = flat(network.parameters).numpy()
    solution = solve(columns, theta)
    size = np.linalg.norm(theta)
    n = len(x)
    limit = solution[:n][image]
    clipped = np.concatenate([solution[:n], np.minimum(solution[n:], limit)])
    excess = (solution[n:] - limit).max(initial=0.0) / max(solution[:n].max(), np.finfo(float).tiny)
    return ClarkeFit(
        float(np.linalg.norm(theta - columns @ solution) / size),
        float(np.linalg.norm(theta - columns @ clipped) / size),
        float(excess),
        int(kinked.sum()),
        int(kinked.numel()),
    )


def least_margin(task: str, network: Network, x: Tensor, labels: Tensor) -> float:
    """Return the least margin over the images."""
    return float(label_margins(task, outputs(network, x), labels).min())
