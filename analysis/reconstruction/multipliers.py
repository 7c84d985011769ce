"""λ from weights and images: non-negative least squares in fp64, with fixed gates and with Clarke gates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import nnls
from torch import Tensor

from analysis.reconstruction.network import (
    ForwardPass,
    Gates,
    GradientFactor,
    Network,
    constraints,
    factors,
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
CLARKE_NUMBERS = 2**27
"""Most entries of the matrix of the Clarke fit, 1 GiB in fp64."""


@dataclass(frozen=True)
class MultiplierFit:
    """min over λ ≥ 0 of ‖θ − u(λ)‖.

    Attributes:
        lambdas: (n, r), a multiplier of each of `network.constraints`.
        residual: ε = ‖θ − u‖/‖θ‖.
    """

    lambdas: Tensor
    residual: float


def fit(
    task: str,
    network: Network,
    x: Tensor,
    labels: Tensor,
    gates: Gates = recomputed,
    *,
    only_strongest: bool = False,
) -> MultiplierFit:
    """Return the best λ ≥ 0 for these images, from the Gram matrix of the gradients of their n·r margins.

    With a gradient of layer l as δᵢaᵢᵀ, the Gram matrix is Σ_l δδᵀ ∘ aaᵀ: no (n·r, p) matrix is formed. The Gram
    matrix squares the condition number, so λ on the support is refined once by the residual θ − u itself, in fp64.

    Args:
        x: (n, d) float64. labels: (n,).
        gates: of the residual; the network's own, inherited ones, or smoothed.
        only_strongest: one multiplier per image, of its least margin, as the published attack has it; λ is (n, 1).
    """
    with torch.no_grad():
        passed = forward(network, x, gates)
        if only_strongest:
            c = kkt_coefficients(task, passed.outputs, labels).unsqueeze(1)
        else:
            c = constraints(task, passed.outputs, labels)
        shape = c.shape[:2]
        # A row per margin: the forward pass of an image serves all of its rivals.
        passed, c = _repeated(passed, shape[1]), c.flatten(0, 1)
        single = factors(network, passed, c)
        products = gram(single)
        target = _inner(network.matrices, single)
        lambdas = torch.from_numpy(_nonnegative(products.numpy(), target.numpy()))
        support = lambdas > 0
        left = _left(network, passed, lambdas.unsqueeze(-1) * c)
        # On the support the least-squares conditions are linear; a step that makes a λ negative is not taken.
        slope = _inner(left, single)[support].unsqueeze(-1)
        refined = lambdas.clone()
        if bool(support.any()):
            refined[support] += torch.linalg.lstsq(
                products[support][:, support], slope, driver="gelsd"
            ).solution[:, 0]
        total = network.squared_norm**0.5
        sizes = [_size(left)]
        if bool((refined >= 0).all()):
            sizes.append(_size(_left(network, passed, refined.unsqueeze(-1) * c)))
    if len(sizes) == 2 and sizes[1] <= sizes[0]:
        return MultiplierFit(refined.view(shape), sizes[1] / total)
    return MultiplierFit(lambdas.view(shape), sizes[0] / total)


def residual(
    task: str, network: Network, x: Tensor, labels: Tensor, lambdas: Tensor, gates: Gates = recomputed
) -> float:
    """Return ‖θ − Σ λᵢⱼ∇⟨cᵢⱼ, Φ(xᵢ)⟩‖/‖θ‖ for given λ (n, r), the c of `network.constraints`."""
    passed = forward(network, x, gates)
    return _size(_left(network, passed, weighted(task, passed.outputs, labels, lambdas))) / (
        network.squared_norm**0.5
    )


def weighted(task: str, outputs: Tensor, labels: Tensor, lambdas: Tensor) -> Tensor:
    """Return Σⱼ λᵢⱼcᵢⱼ (n, k) for λ (n, r): what each image contributes to the outputs' side of u."""
    return (lambdas.unsqueeze(-1) * constraints(task, outputs, labels)).sum(1)


def _repeated(passed: ForwardPass, times: int) -> ForwardPass:
    """Return a pass in which each image comes `times` times in a row."""
    if times == 1:
        return passed
    inputs, gates, hidden = (
        [part.repeat_interleave(times, 0) for part in parts]
        for parts in (passed.inputs, passed.gates, passed.hidden)
    )
    return ForwardPass(inputs, gates, hidden, passed.outputs.repeat_interleave(times, 0))


def gram(single: Sequence[GradientFactor]) -> Tensor:
    """Return ⟨∇ᵢ, ∇ⱼ⟩ over all parameters, (n, n), for gradients δᵢaᵢᵀ of n images in each layer: Σ_l δδᵀ ∘ aaᵀ."""
    return torch.stack([(f.delta @ f.delta.T) * (f.inputs @ f.inputs.T) for f in single]).sum(0)


def _inner(matrices: Sequence[Tensor], single: Sequence[GradientFactor]) -> Tensor:
    """Return ⟨matrices, gradient of image i⟩ for each image, (n,)."""
    parts = [((f.delta @ m) * f.inputs).sum(-1) for m, f in zip(matrices, single, strict=True)]
    return torch.stack(parts).sum(0)


def _left(network: Network, passed: ForwardPass, coefficients: Tensor) -> list[Tensor]:
    """Return θ − u as matrices, for coefficients λᵢcᵢ (n, k)."""
    u = factors(network, passed, coefficients)
    return [m - factor.product() for m, factor in zip(network.matrices, u, strict=True)]


def _size(matrices: Sequence[Tensor]) -> float:
    return float(sum(m.square().sum() for m in matrices)) ** 0.5


def _nonnegative(products: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Return argmin_{λ ≥ 0} λᵀGλ − 2bᵀλ, as least squares with a root of G; directions of rounding are left out."""
    values, vectors = np.linalg.eigh(products)
    kept = values > values[-1] * len(products) * np.finfo(float).eps
    root = np.sqrt(values[kept])
    columns = root[:, None] * vectors[:, kept].T
    return solve(columns, (vectors[:, kept].T @ target) / root)


def solve(columns: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Return argmin_{λ ≥ 0} ‖target − columns·λ‖ for columns (p, n)."""
    # The triangular factor has at most n rows in place of p; nothing is squared.
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

    Each kinked pair is a column of its own, so that networks with more than `CLARKE_NUMBERS` entries get None, too.

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
    if (len(x) + int(kinked.sum())) * sum(p.numel() for p in network.parameters) > CLARKE_NUMBERS:
        return None
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
