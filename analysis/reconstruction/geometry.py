"""Norms of parameters, their duals, and how well u = Σ λᵢcᵢ∇Φ is aligned with θ in each.

Steepest descent in a norm ‖·‖ ends at a KKT point of min ½‖θ‖² in that norm (Tsilivis et al. 2024, arXiv
2410.22069): u lies in the subdifferential of ½‖·‖² at θ, so that ⟨θ, u⟩ = ‖θ‖·‖u‖_* exactly there. The
alignment a = ⟨θ, u⟩ / (‖θ‖·‖u‖_*) ∈ [0, 1] measures how nearly.

Gradients come as factors δᵀa over n images, and n is small: no matrix of the weights' size is differentiated.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from analysis.reconstruction.network import GradientFactor, Network, constraints, factors, forward

NORMS = ("l2", "spectral", "linf", "hybrid")
STEPS = 200
"""Exponentiated-gradient steps of the search for the best alignment."""


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

    def pieces(self, network: Network) -> list[tuple[str, float]]:
        """Return ("spectral" | "linf", scale) of each parameter; not for ℓ2, which is one piece."""
        count = len(network.parameters)
        if self.norm != "hybrid":
            return [(self.norm, 1.0)] * count
        scales = self.scales or (1.0,) * count
        return [("spectral" if i < network.depth - 1 else "linf", s) for i, s in enumerate(scales)]


def norm(geometry: Geometry, network: Network) -> Tensor:
    """Return the norm ‖θ‖ of all parameters, 0-dim."""
    if geometry.norm == "l2":
        return torch.stack([p.square().sum() for p in network.parameters]).sum().sqrt()
    norms = [
        (matrix.abs().max() if kind == "linf" else torch.linalg.matrix_norm(matrix, 2)) / scale
        for matrix, (kind, scale) in zip(network.matrices, geometry.pieces(network))
    ]
    return torch.stack(norms).max()


def dual(geometry: Geometry, network: Network, u: Sequence[GradientFactor]) -> Tensor:
    """Return ‖u‖_* (…), differentiable: the dual of a maximum is a sum, Σ sₗ·(nuclear or ℓ₁ norm)."""
    if geometry.norm == "l2":
        return torch.stack([factor.squared_norm() for factor in u]).sum(0).clamp_min(0).sqrt()
    norms = [
        (_absolute(factor) if kind == "linf" else nuclear(factor)) * scale
        for factor, (kind, scale) in zip(u, geometry.pieces(network))
    ]
    return torch.stack(norms).sum(0)


def alignment(
    geometry: Geometry, network: Network, u: Sequence[GradientFactor], size: Tensor | None = None
) -> Tensor:
    """Return the alignment a (…) = ⟨θ, u⟩ / (‖θ‖·‖u‖_*) (arXiv 2410.22069).

    Args:
        size: ‖θ‖, if it is known.
    """
    inner = torch.stack([factor.inner(matrix) for matrix, factor in zip(network.matrices, u)]).sum(0)
    size = norm(geometry, network) if size is None else size
    return inner / (size * dual(geometry, network, u)).clamp_min(torch.finfo(inner.dtype).tiny)


def squared_distance(
    network: Network, u: Sequence[GradientFactor], total: Tensor | float | None = None
) -> Tensor:
    """Return ‖θ − u‖² (…), expanded: rounding is 1e-16 of ‖θ‖², far below any residual of an attack.

    Args:
        total: ‖θ‖², if it is known.
    """
    parts = [factor.squared_norm() - 2 * factor.inner(matrix) for matrix, factor in zip(network.matrices, u)]
    total = network.squared_norm if total is None else total
    return (total + torch.stack(parts).sum(0)).clamp_min(0)


def polar(matrix: Tensor) -> Tensor:
    """Return UVᵀ of the singular value decomposition (…, m, n), without directions of singular value 0."""
    u, sigma, v = torch.linalg.svd(matrix, full_matrices=False)
    cut = sigma[..., :1] * (max(matrix.shape[-2:]) * torch.finfo(matrix.dtype).eps)
    return (u * (sigma > cut).unsqueeze(-2)) @ v


def nuclear(factor: GradientFactor) -> Tensor:
    """Return the nuclear norm (…) of δᵀa with its gradient, the polar factor, all in the n images' space.

    With aᵀ = QL: δᵀa = (Lδ)ᵀQᵀ has the singular values of Lδ, and its polar factor is δᵀa·R with
    R = Q(L δδᵀ Lᵀ)^(-1/2)Qᵀ. With all but the first factor of each held fixed, ½⟨δδᵀ, aRaᵀ⟩ has the gradient in
    δ and ⟨a, δδᵀaR⟩ the one in a; both are the norm or half of it.
    """
    delta, a = factor
    with torch.no_grad():
        q, triangle = torch.linalg.qr(a.mT)
        gram = delta @ delta.mT
        values, vectors = torch.linalg.eigh(triangle @ gram @ triangle.mT)
        # The Gram matrix knows squares to a relative 1e-16: what lies below is rounding.
        cut = values[..., -1:] * (values.shape[-1] * torch.finfo(values.dtype).eps)
        nonzero = (values > cut) & (values > 0)
        root = torch.where(nonzero, values, 1.0).rsqrt() * nonzero
        right = (vectors * root.unsqueeze(-2)) @ vectors.mT
        of_images = triangle.mT @ right @ triangle
        a_root = triangle.mT @ right @ q.mT
    of_delta = 0.5 * ((delta @ delta.mT) * of_images).sum((-2, -1))
    of_inputs = (a * (gram @ a_root)).sum((-2, -1))
    return of_delta + of_inputs - 0.5 * of_inputs.detach()


def _absolute(factor: GradientFactor) -> Tensor:
    """Return the ℓ₁ norm (…) of δᵀa; with the signs held fixed its gradient is theirs."""
    with torch.no_grad():
        signs = factor.product().sign()
    return factor.inner(signs)


def best_alignment(
    task: str,
    network: Network,
    x: Tensor,
    labels: Tensor,
    norm_geometry: Geometry,
    start: Tensor,
    steps: int = STEPS,
) -> float:
    """Return max over λ ≥ 0 of a(λ) = ⟨θ, u(λ)⟩/(‖θ‖·‖u(λ)‖_*), or the best that the search reaches.

    In ℓ2 the least-squares λ is the maximizer and a = √(1 − ε²). Elsewhere ⟨θ, u⟩ is linear and ‖u‖_* convex
    in λ, so that a is quasi-concave; any λ ≥ 0 gives a valid lower bound. Two starts (least squares, uniform),
    multiplicative steps that shrink as k^-1/2, the best value kept.

    Args:
        x: (n, d). labels: (n,).
        start: (n, r) the least-squares λ, one per margin of `network.constraints`.
    """
    passed = forward(network, x)
    c = constraints(task, passed.outputs, labels)
    size = norm(norm_geometry, network)

    def value(lambdas: Tensor) -> Tensor:
        u = factors(network, passed, (lambdas.unsqueeze(-1) * c).sum(1))
        return alignment(norm_geometry, network, u, size)

    best = float(value(start))
    if norm_geometry.norm == "l2":
        return best
    share = start.clamp_min(0) / start.clamp_min(0).sum().clamp_min(1e-300)
    uniform = torch.full_like(share, 1 / share.numel())
    # A zero stays zero under multiplication: the least-squares start is mixed with a little of everything.
    for lambdas in (0.9 * share + 0.1 * uniform, uniform):
        best = max(best, _ascended(lambdas.clone(), value, steps))
    return best


def _ascended(lambdas: Tensor, value: Callable[[Tensor], Tensor], steps: int) -> float:
    best = 0.0
    for k in range(steps):
        lambdas.requires_grad_(True)
        a = value(lambdas)
        (slope,) = torch.autograd.grad(a, lambdas)
        best = max(best, float(a.detach()))
        with torch.no_grad():
            pull = slope * lambdas
            size = pull.abs().max().clamp_min(1e-300)
            # Multiplicative weights: the largest exponent is 1 at first, on the scale-free λ·∂a/∂λ.
            lambdas = lambdas * torch.exp(pull / size / (1 + k) ** 0.5)
            lambdas = lambdas / lambdas.sum()
    return best
