"""Σ cᵢ∇_θΦ(xᵢ) against autograd and the closed form; smoothing; the scale gauge: acceptance 4 and 5."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.optimize
import torch
from torch import Tensor, nn

from analysis.reconstruction import multipliers
from analysis.reconstruction.network import (
    Network,
    all_margins,
    combination,
    constraints,
    factors,
    flat,
    forward,
    inherited,
    input_gradients,
    kkt_coefficients,
    label_margins,
    output_descent,
    outputs,
    patterns,
    per_sample,
    recomputed,
    smoothed,
)
from tests.analysis.reconstruction.problems import fixture, pair


def _random(widths: tuple[int, ...], bias: bool, seed: int = 0) -> Network:
    g = torch.Generator().manual_seed(seed)
    weights = tuple(
        torch.randn(rows, columns, generator=g, dtype=torch.float64) / columns**0.5
        for rows, columns in zip(widths[1:], widths[:-1])
    )
    return Network(weights, torch.randn(widths[1], generator=g, dtype=torch.float64) if bias else None)


def _inputs(n: int, d: int, k: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(7)
    return torch.randn(n, d, generator=g, dtype=torch.float64), torch.randn(
        n, k, generator=g, dtype=torch.float64
    )


def _module(network: Network) -> nn.Sequential:
    layers: list[nn.Module] = []
    for i, weight in enumerate(network.weights):
        has_bias = i == 0 and network.bias is not None
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=has_bias, dtype=torch.float64)
        with torch.no_grad():
            layer.weight.copy_(weight)
            if has_bias and network.bias is not None:
                layer.bias.copy_(network.bias)
        layers += [layer, nn.ReLU()]
    return nn.Sequential(*layers[:-1])


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("widths", [(6, 9, 1), (6, 8, 7, 3), (5, 6, 6, 6, 2)])
def test_the_sum_of_gradients_is_autograds(widths: tuple[int, ...], bias: bool) -> None:
    network = _random(widths, bias)
    x, c = _inputs(4, widths[0], widths[-1])
    module = _module(network)
    x.requires_grad_(True)
    total = (module(x) * c).sum()
    grads = torch.autograd.grad(total, [*module.parameters(), x])
    by_name = dict(zip([name for name, _ in module.named_parameters()], grads))
    expected = [by_name[f"{2 * i}.weight"] for i in range(network.depth)] + (
        [by_name["0.bias"]] if bias else []
    )
    x = x.detach()
    found = combination(network, forward(network, x), c)
    for one, other in zip(found, expected):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)
    torch.testing.assert_close(outputs(network, x), module(x).detach(), rtol=0, atol=1e-12)
    torch.testing.assert_close(input_gradients(network, x, c), grads[-1], rtol=0, atol=1e-10)
    torch.testing.assert_close(per_sample(network, x, c).sum(0), flat(found), rtol=0, atol=1e-10)


def test_two_layers_in_closed_form() -> None:
    network, x, labels = fixture().network, pair().x, pair().labels
    w, v = network.weights
    gates = (x @ w.T > 0).double()
    lambdas = torch.linspace(0.1, 1, len(x), dtype=torch.float64)
    back = (lambdas * labels).unsqueeze(1) * gates * v
    found = combination(network, forward(network, x), (lambdas * labels).unsqueeze(1))
    torch.testing.assert_close(found[0], back.T @ x, rtol=0, atol=1e-10)
    torch.testing.assert_close(found[1], ((lambdas * labels) @ (x @ w.T).relu())[None], rtol=0, atol=1e-10)
    # Control: without the labels it is another sum.
    assert float((found[0] - (lambdas.unsqueeze(1) * gates * v).T @ x).abs().max()) > 1e-3


def test_sharp_smoothing_is_relu_away_from_kinks() -> None:
    network = _random((6, 8, 7, 1), bias=True)
    x, c = _inputs(5, 6, 1)
    assert min(float(h.abs().min()) for h in forward(network, x).hidden) > 1e-4
    hard = flat(combination(network, forward(network, x), c))
    soft = flat(combination(network, forward(network, x, smoothed(1e6)), c))
    # σ(αh) at |αh| > 100 differs from 0 or 1 by less than 1e-43.
    torch.testing.assert_close(soft, hard, rtol=0, atol=1e-12)
    blunt = flat(combination(network, forward(network, x, smoothed(1.0)), c))
    assert float((blunt - hard).abs().max()) > 1e-2


class _Published(torch.autograd.Function):
    """relu forward, σ(αh) backward: written from the paper as an independent oracle for second derivatives."""

    @staticmethod
    def forward(ctx, h: Tensor, alpha: float) -> Tensor:
        ctx.save_for_backward(h)
        ctx.alpha = alpha
        return h.clamp_min(0)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore
        (h,) = ctx.saved_tensors
        return grad * torch.sigmoid(ctx.alpha * h), None


def test_derivatives_of_the_attack_are_those_of_double_backpropagation() -> None:
    network = _random((6, 8, 7, 1), bias=True)
    x, c = _inputs(5, 6, 1)
    alpha, theta = 20.0, flat(network.parameters)

    def ours(x: Tensor, c: Tensor) -> Tensor:
        return (theta - flat(combination(network, forward(network, x, smoothed(alpha)), c))).square().sum()

    def published(x: Tensor, c: Tensor) -> Tensor:
        held = [p.clone().requires_grad_(True) for p in network.parameters]
        h = x @ held[0].T + held[3]
        h = _Published.apply(h, alpha) @ held[1].T  # pyright: ignore
        total = ((_Published.apply(h, alpha) @ held[2].T) * c).sum()  # pyright: ignore
        u = torch.autograd.grad(total, held, create_graph=True)
        return (theta - torch.cat([part.flatten() for part in u])).square().sum()

    torch.testing.assert_close(published(x, c).detach(), ours(x, c).detach(), rtol=1e-12, atol=0)
    grads = []
    for function in (ours, published):
        a, b = x.clone().requires_grad_(True), c.clone().requires_grad_(True)
        grads.append(torch.autograd.grad(function(a, b), (a, b)))
    torch.testing.assert_close(grads[0][0], grads[1][0], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(grads[0][1], grads[1][1], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("bias", [False, True])
def test_scale_gauge(bias: bool) -> None:
    network = _random((6, 9, 5, 1), bias)
    x, c = _inputs(4, 6, 1)

    def u(scale: float, alpha: float | None = None) -> Tensor:
        done = forward(network, scale * x, recomputed if alpha is None else smoothed(alpha))
        return flat(combination(network, done, c / scale))

    moved = float((u(3.0) - u(1.0)).abs().max())
    if bias:
        assert moved > 1e-2
    else:
        assert moved <= 1e-12
        # Finite smoothing sees the scale: σ(αh) is not a function of h's sign alone.
        assert float((u(3.0, 5.0) - u(1.0, 5.0)).abs().max()) > 1e-3


def test_a_pattern_keeping_split_of_one_point_in_a_deep_net() -> None:
    network = _random((64, 50, 30, 1), bias=True)
    x, c = _inputs(1, 64, 1)
    slope = input_gradients(network, x, c)[0]
    direction = torch.randn(64, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    direction -= direction @ slope / slope.square().sum() * slope
    direction /= direction.norm()
    step = 1.0
    moved = torch.stack([x[0] + step * direction, x[0] - step * direction])
    while any(bool((g != g[:1]).any()) for g in patterns(network, torch.cat([x, moved]))):
        step /= 2
        moved = torch.stack([x[0] + step * direction, x[0] - step * direction])
    assert step >= 2**-12
    whole = flat(combination(network, forward(network, x), c))
    halves = flat(combination(network, forward(network, moved), c.expand(2, 1) / 2))
    torch.testing.assert_close(halves, whole, rtol=0, atol=1e-12)
    torch.testing.assert_close(outputs(network, moved), outputs(network, x).expand(2, 1), rtol=0, atol=1e-12)
    # Control: a step that breaks the pattern changes the sum, unless the gates are inherited.
    far = torch.stack([x[0] + 10 * direction, x[0] - 10 * direction])
    broken = flat(combination(network, forward(network, far), c.expand(2, 1) / 2))
    assert float((broken - whole).abs().max()) > 1e-2
    held = inherited([g.expand(2, -1) for g in patterns(network, x)])
    kept = flat(combination(network, forward(network, far, held), c.expand(2, 1) / 2))
    torch.testing.assert_close(kept, whole, rtol=0, atol=1e-11)


def test_a_bias_carries_the_offset_of_all_images() -> None:
    """W₁ = Σ cᵢxᵢᵀ and b = Σ cᵢ for the same gates, at any depth: o on every pixel adds o·b·1ᵀ to W₁."""
    network = _random((6, 9, 7, 1), bias=True)
    x, c = _inputs(12, 6, 1)
    held = inherited(patterns(network, x))
    plain = combination(network, forward(network, x, held), c)
    moved = combination(network, forward(network, x + 0.7, held), c)
    torch.testing.assert_close(moved[0], plain[0] + 0.7 * plain[-1].unsqueeze(1), rtol=0, atol=1e-12)
    torch.testing.assert_close(moved[-1], plain[-1], rtol=0, atol=1e-12)
    # Control: where the offset changes gates, it does more.
    free = combination(network, forward(network, x + 0.7), c)
    assert float((free[0] - moved[0]).abs().max()) > 1e-2


def test_coefficients_of_the_tasks() -> None:
    out = torch.tensor([[1.0, 3.0, 2.0], [0.5, 0.1, 0.4]], dtype=torch.float64)
    labels = torch.tensor([2.0, 0.0])
    c = kkt_coefficients("multiclass", out, labels)
    assert c.tolist() == [[0, -1, 1], [1, 0, -1]]
    every = constraints("multiclass", out, labels)
    assert every.tolist() == [[[-1, 0, 1], [0, -1, 1]], [[1, -1, 0], [1, 0, -1]]]
    torch.testing.assert_close(
        all_margins("multiclass", out, labels), torch.tensor([[1.0, -1.0], [0.4, 0.1]]).double()
    )
    torch.testing.assert_close(label_margins("multiclass", out, labels), torch.tensor([-1.0, 0.1]).double())
    for task, values in (
        ("binary", torch.tensor([1.0, -1.0])),
        ("multiclass", labels),
    ):
        start = out.clone() if task == "multiclass" else out[:, :1].clone()
        start.requires_grad_(True)
        if task == "binary":
            loss = torch.logsumexp(-values * start[:, 0], 0)
        else:
            gaps = start - start.gather(1, values.long().unsqueeze(1))
            own = nn.functional.one_hot(values.long(), 3).bool()
            loss = torch.logsumexp(gaps.masked_fill(own, -torch.inf).flatten(), 0)
        (slope,) = torch.autograd.grad(loss, start)
        torch.testing.assert_close(
            output_descent(task, start.detach(), values.double()), -slope, rtol=0, atol=1e-12
        )


@pytest.mark.parametrize(("widths", "bias"), [((6, 9, 1), False), ((6, 8, 7, 3), True)])
@pytest.mark.parametrize("alpha", [None, 5.0])
def test_multipliers_from_the_factored_gram_are_those_of_the_full_gradients(
    widths: tuple[int, ...], bias: bool, alpha: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: scipy's non-negative least squares on the (p, n) gradients, which `fit` must not form."""
    task = "binary" if widths[-1] == 1 else "multiclass"
    gates = recomputed if alpha is None else smoothed(alpha)
    network = _random(widths, bias)
    x, _ = _inputs(12, widths[0], 1)
    passed = forward(network, x, gates)
    labels = passed.outputs[:, 0].sign() if task == "binary" else passed.outputs.argmax(-1).double()
    strongest = kkt_coefficients(task, passed.outputs, labels)
    every = constraints(task, passed.outputs, labels)
    theta = flat(network.parameters).numpy()
    single = per_sample(network, x, strongest, gates).numpy().T
    dense = np.stack([per_sample(network, x, c, gates).numpy() for c in every.unbind(1)], 1)
    dense = dense.reshape(-1, len(theta)).T
    c = strongest
    gram = multipliers.gram(factors(network, passed, c)).numpy()
    np.testing.assert_allclose(gram, single.T @ single, rtol=1e-12, atol=1e-12)
    solved = {name: scipy.optimize.nnls(of, theta) for name, of in (("all", dense), ("strongest", single))}
    expected, gap = solved["all"]
    monkeypatch.setattr(multipliers, "per_sample", None)
    found = multipliers.fit(task, network, x, labels, gates)
    assert found.residual == pytest.approx(gap / np.linalg.norm(theta), rel=1e-10)
    np.testing.assert_allclose(found.lambdas.numpy().ravel(), expected, atol=1e-8)
    assert found.lambdas.shape == (12, 1 if task == "binary" else widths[-1] - 1)
    published = multipliers.fit(task, network, x, labels, gates, only_strongest=True)
    assert published.residual == pytest.approx(solved["strongest"][1] / np.linalg.norm(theta), rel=1e-10)
    # With several classes the published form explains less: another class may be as strong.
    assert (published.residual > found.residual + 1e-3) == (task == "multiclass")
    assert 0 < int((found.lambdas > 0).sum()) < found.lambdas.numel()
    # Control: without the bias' or the head's factor it is another matrix.
    part = multipliers.gram(factors(network, passed, c)[:-1]).numpy()
    assert np.abs(part - single.T @ single).max() > 1e-2
    # Least squares on the support: nothing left along any gradient that is used.
    lambdas = found.lambdas.numpy().ravel()
    left = theta - dense @ lambdas
    assert np.abs(dense.T @ left)[lambdas > 0].max() < 1e-12 * np.linalg.norm(theta) ** 2
