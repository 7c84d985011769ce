"""The best alignment over λ ≥ 0: a convex problem on the simplex, solved by exponentiated gradients."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from analysis.reconstruction import geometry, tasks
from analysis.reconstruction.geometry import Geometry
from analysis.reconstruction.network import Network, factors, forward

STEPS = 200


def best_alignment(
    task: str,
    network: Network,
    x: Tensor,
    labels: Tensor,
    chosen: Geometry,
    start: Tensor,
    steps: int = STEPS,
) -> float:
    """max over λ of a(λ) = ⟨θ, u(λ)⟩/(‖θ‖·‖u(λ)‖_*), or the best that was found.

    In ℓ2 the least-squares λ is the maximizer and a = √(1 − ε²). Elsewhere ⟨θ, u⟩ is linear and ‖u‖_* convex
    in λ, so that a is quasi-concave; any λ ≥ 0 gives a valid lower bound. Two starts (least squares, uniform),
    multiplicative steps that shrink as k^-1/2, the best value kept.

    Args:
        x: (n, d). labels: (n,).
        start: (n,) the least-squares λ.
    """
    done = forward(network, x)
    c = tasks.coefficients(task, done.outputs, labels)
    size = geometry.norm(chosen, network)

    def value(lambdas: Tensor) -> Tensor:
        u = factors(network, done, lambdas.unsqueeze(-1) * c)
        return geometry.alignment(chosen, network, u, size)

    best = float(value(start))
    if chosen.norm == "l2" or task == "regression":
        return best
    share = start.clamp_min(0) / start.clamp_min(0).sum().clamp_min(1e-300)
    uniform = torch.full_like(share, 1 / len(share))
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
