"""Norms, duals and alignment: acceptance 8 on random weights, and the factored forms against the plain ones."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from analysis.reconstruction import geometry, multipliers
from analysis.reconstruction.geometry import NORMS, Geometry, best_alignment
from analysis.reconstruction.network import GradientFactor, Network, combination, factors, flat, forward
from tests.analysis.reconstruction.problems import digits, norm_of, trained


def _random(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _network(bias: bool) -> Network:
    return Network(
        (_random(9, 6), _random(5, 9, seed=1), _random(1, 5, seed=2)), _random(9) if bias else None
    )


@pytest.mark.parametrize("n", [3, 12])
def test_the_nuclear_norm_and_its_gradient(n: int) -> None:
    """n below and above the sides of the matrix; the oracle is torch's differentiable SVD."""
    delta, a = _random(2, n, 7), _random(2, n, 5, seed=1)
    found, grads = [], []
    for value in (
        lambda d, x: geometry.nuclear(GradientFactor(d, x)),
        lambda d, x: torch.linalg.svdvals(d.mT @ x).sum(-1),
    ):
        d, x = delta.clone().requires_grad_(True), a.clone().requires_grad_(True)
        out = value(d, x)
        found.append(out.detach())
        grads.append(torch.autograd.grad(out.sum(), (d, x)))
    torch.testing.assert_close(found[0], found[1], rtol=1e-10, atol=0)
    for one, other in zip(*grads):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8)


def test_the_nuclear_norm_of_a_rank_deficient_factor() -> None:
    delta, a = _random(4, 7), _random(4, 5, seed=1)
    twice = GradientFactor(torch.cat([delta, delta]), torch.cat([a, a]))
    expected = 2 * torch.linalg.svdvals(delta.mT @ a).sum()
    torch.testing.assert_close(geometry.nuclear(twice), expected, rtol=1e-7, atol=0)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("norm", NORMS)
def test_the_dual_is_dual(norm: str, bias: bool) -> None:
    """Hölder's inequality for every norm, with equality at the dual's gradient."""
    network = _network(bias)
    chosen = Geometry(norm, (0.5, 2.0, 1.0, 0.1)[: len(network.parameters)] if norm == "hybrid" else ())
    x, c = _random(4, 6, seed=5), _random(4, 1, seed=6)
    u = factors(network, forward(network, x), c)
    dual = geometry.dual(chosen, network, u)
    size = geometry.norm(chosen, network)
    inner = sum(
        (t * p).sum() for t, p in zip(network.parameters, combination(network, forward(network, x), c))
    )
    assert abs(float(inner)) <= float(size * dual) * (1 + 1e-12)
    a = geometry.alignment(chosen, network, u)
    assert float(a) == pytest.approx(float(inner / (size * dual)), rel=1e-10)
    # The maximizer of ⟨u, ·⟩ on the unit ball is the dual's gradient with respect to u.
    best = _maximizer(chosen, network, u)
    assert float(geometry.norm(chosen, best)) == pytest.approx(1, abs=1e-9)
    reached = sum(f.inner(m) for f, m in zip(u, best.matrices))
    assert float(reached) == pytest.approx(float(dual), rel=1e-9)


def _maximizer(chosen: Geometry, network: Network, u: list[GradientFactor]) -> Network:
    products = [f.product() for f in u]
    if chosen.norm == "l2":
        total = torch.stack([p.square().sum() for p in products]).sum().sqrt()
        parts = [p / total for p in products]
    else:
        pieces = chosen.pieces(network)
        parts = [
            (p.sign() if kind == "linf" else geometry.polar(p)) * s for p, (kind, s) in zip(products, pieces)
        ]
    bias = parts[-1].squeeze(-1) if network.bias is not None else None
    return Network(tuple(parts[: network.depth]), bias)


@pytest.mark.parametrize("bias", [False, True])
def test_distances_without_forming_the_gradient(bias: bool) -> None:
    network = _network(bias)
    x, c = _random(4, 6, seed=5), _random(4, 1, seed=6)
    u = factors(network, forward(network, x), c)
    plain = flat(network.parameters) - flat(combination(network, forward(network, x), c))
    found = geometry.squared_distance(network, u)
    torch.testing.assert_close(found, plain.square().sum(), rtol=1e-12, atol=0)


def test_l2_alignment_is_the_residual() -> None:
    """max over λ of a₂ = √(1 − ε²): Pythagoras at the least-squares λ."""
    data = digits(5)
    network = trained("gd", 5, 400, (500,))[-1].network
    fit = multipliers.fit("binary", network, data.x, data.labels)
    a = best_alignment("binary", network, data.x, data.labels, Geometry("l2"), fit.lambdas)
    assert a == pytest.approx((1 - fit.residual**2) ** 0.5, abs=1e-8)
    # Control: other multipliers align less.
    done = forward(network, data.x)
    other = factors(network, done, fit.lambdas.roll(1) * data.labels.unsqueeze(1))
    assert float(geometry.alignment(Geometry("l2"), network, other)) < a - 1e-3


@pytest.mark.parametrize(
    ("optimizer", "steps", "own", "least"),
    [("muon_svd", 900, "spectral", 0.8), pytest.param("adamw", 5000, "linf", 0.7, marks=pytest.mark.slow)],
)
def test_each_optimizer_aligns_in_its_own_norm(optimizer: str, steps: int, own: str, least: float) -> None:
    data = digits(20)
    network = trained(optimizer, 20, 100, (500, steps))[-1].network
    fit = multipliers.fit("binary", network, data.x, data.labels)
    found = {
        norm: best_alignment("binary", network, data.x, data.labels, Geometry(norm), fit.lambdas)
        for norm in ("l2", "spectral", "linf")
    }
    assert all(0 <= a <= 1 for a in found.values())
    other = "linf" if own == "spectral" else "spectral"
    assert found[own] > least > found[other]
    assert found[own] > found["l2"]


def test_hybrid_norms_know_the_steps_of_their_optimizer() -> None:
    assert norm_of("gd", 400).norm == "l2"
    assert norm_of("adamw", 400).norm == "linf"
    muon = norm_of("muon", 400)
    # One step moves the 400×64 matrix by lr·√(400/64) in the spectral norm, the head by aux_lr.
    assert muon.scales == pytest.approx((0.02 * 2.5, 0.002))
