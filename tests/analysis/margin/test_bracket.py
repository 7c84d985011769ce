"""Certified radius ≤ true margin ≤ attack radius: against exact margins, brute force, and foolbox where installed."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from analysis.margin.input_margins import (
    attack,
    certified_radius,
    functional_margins,
    layers_of,
    lipschitz_radius,
)
from analysis.margin.net import Nets, exact_margin
from tests.analysis.margin.toys import I1, A, net, random_net, states


def classifier(toy: Nets) -> nn.Sequential:
    """The toy net with the scores (-f, f): label 1 where f > 0."""
    hidden = torch.tensor(toy.hidden[..., 0])
    v = torch.tensor(toy.output[:, 0])
    k, width = hidden.shape
    first, last = (
        nn.Linear(width - 1, k, dtype=torch.float64),
        nn.Linear(k, 2, bias=False, dtype=torch.float64),
    )
    with torch.no_grad():
        first.weight.copy_(hidden[:, :-1])
        assert first.bias is not None
        first.bias.copy_(hidden[:, -1])
        last.weight.copy_(torch.stack([-v, v]))
    return nn.Sequential(first, nn.ReLU(), last)


def mlp(seed: int, *widths: int) -> nn.Sequential:
    """A random chain with biases."""
    torch.manual_seed(seed)
    parts: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        parts += [nn.Linear(before, after, dtype=torch.float64), nn.ReLU()]
        with torch.no_grad():
            # With torch's start a deep chain gives every input the same label.
            next(parts[-2].parameters()).mul_(3.0)
    return nn.Sequential(*parts[:-1])


def test_20_the_bracket_closes_on_the_trained_toy_net() -> None:
    """One rising and one falling neuron: interval bounds are exact."""
    toy = states(net(*I1), [0, 10_000])[-1]
    model = classifier(toy)
    x, labels = torch.tensor([[-1.0], [1.0]], dtype=torch.float64), torch.tensor([0, 1])
    exact = exact_margin(toy, A.points).each
    assert sorted(exact) == pytest.approx([0.8775127090, 1.1224872910], abs=1e-9)
    for norm in ("l2", "linf"):
        upper = attack(model, x, labels, norm)
        for method in ("ibp", "crown"):
            lower = certified_radius(model, x, labels, norm, method, upper)
            assert (lower <= upper).all()
            assert (upper - lower).max() < 1e-6
        assert lower.tolist() == pytest.approx(exact.tolist(), abs=1e-9)
        assert upper.tolist() == pytest.approx(exact.tolist(), abs=1e-9)


@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize("widths", [(5, 16, 4), (5, 12, 12, 3), (3, 8, 8, 8, 3)])
def test_20_certified_below_attack_on_every_sample(norm: str, widths: tuple[int, ...]) -> None:
    model = mlp(0, *widths)
    x = torch.randn(40, widths[0], dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    labels = model(x).argmax(1)
    upper = attack(model, x, labels, norm)
    assert torch.isfinite(upper).all()
    radii = {method: certified_radius(model, x, labels, norm, method, upper) for method in ("ibp", "crown")}
    for lower in radii.values():
        assert (lower > 0.0).all()
        assert (lower <= upper).all()
    # The tighter method is worth its cost.
    assert radii["crown"].median() > radii["ibp"].median()
    if norm == "l2":
        cheap = lipschitz_radius(model, functional_margins(model(x).detach(), labels))
        assert (cheap <= upper).all()
        assert (cheap > 0.0).all()


def test_no_input_inside_a_certified_ball_has_another_label() -> None:
    """Brute force over a fine grid of the box (d = 2)."""
    model = mlp(3, 2, 10, 10, 3)
    x = torch.randn(6, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    labels = model(x).argmax(1)
    upper = attack(model, x, labels, "linf")
    for method in ("ibp", "crown"):
        lower = certified_radius(model, x, labels, "linf", method, upper)
        for point, label, radius, least in zip(x, labels, lower, upper):
            assert _labels_in_box(model, point, float(radius)) == {int(label)}
            # Control: a box a little beyond the attack's radius holds another label.
            assert len(_labels_in_box(model, point, 1.02 * float(least))) > 1


def _labels_in_box(model: nn.Module, point: Tensor, radius: float) -> set[int]:
    line = torch.linspace(-radius, radius, 201, dtype=torch.float64)
    grid = point + torch.cartesian_prod(line, line)
    return set(model(grid).argmax(1).tolist())


def test_the_attack_finds_exact_margins_of_random_toy_nets() -> None:
    """Exact distances in R^3 by region: certified ≤ exact ≤ attack, and the attack mostly on it."""
    excess = []
    for seed in range(12):
        toy = random_net(seed, 2, dim=3)
        model = classifier(toy)
        x = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        f = model(x)[:, 1]
        keep = f != 0.0
        x, labels = x[keep], (f[keep] > 0.0).long()
        if not len(x):
            continue
        from analysis.margin.points import Points

        points = Points(x.numpy(), np.where(labels.numpy() == 1, 1.0, -1.0), "random")
        exact = torch.tensor(exact_margin(toy, points).each)
        upper = attack(model, x, labels, "l2")
        lower = certified_radius(model, x, labels, "l2", "crown", upper)
        assert (exact <= upper + 1e-9).all()
        assert (lower <= exact + 1e-9).all()
        finite = torch.isfinite(upper)
        excess += (upper[finite] / exact[finite] - 1.0).tolist()
    assert len(excess) > 20
    # Where f falls to a flat zone the gradient points along, not towards, its nearest corner.
    assert np.median(excess) < 1e-6
    assert max(excess) < 0.25


def test_a_linear_classifier_has_closed_forms() -> None:
    model = nn.Sequential(nn.Linear(6, 4, dtype=torch.float64))
    x = torch.randn(10, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    labels = model(x).argmax(1)
    weight, _ = layers_of(model)[0]
    z = model(x).detach()
    for norm, order in (("l2", 2), ("linf", 1)):
        exact = []
        for scores, label in zip(z, labels):
            rows = [
                float(
                    (scores[label] - scores[c])
                    / torch.linalg.vector_norm(weight[label] - weight[c], ord=order)
                )
                for c in range(4)
                if c != label
            ]
            exact.append(min(rows))
        upper = attack(model, x, labels, norm)
        assert upper.tolist() == pytest.approx(exact, rel=1e-6)
        for method in ("ibp", "crown"):
            assert certified_radius(model, x, labels, norm, method, upper).tolist() == pytest.approx(
                exact, rel=1e-6
            )


def test_misclassified_points_have_no_margin() -> None:
    model = mlp(0, 4, 8, 3)
    x = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    wrong = (model(x).argmax(1) + 1) % 3
    assert attack(model, x, wrong, "l2").tolist() == [0.0] * 5
    assert (
        certified_radius(model, x, wrong, "l2", "ibp", torch.ones(5, dtype=torch.float64)).tolist()
        == [0.0] * 5
    )


def test_other_networks_are_refused() -> None:
    with pytest.raises(ValueError, match="Sequential"):
        layers_of(nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 2)))


def test_foolbox_agrees() -> None:
    """An independent DeepFool and PGD may be better or worse; neither beats a certificate."""
    foolbox = pytest.importorskip("foolbox", reason="optional: pip install 'optbench[attacks]'")
    model = mlp(0, 5, 16, 4).eval()
    x = torch.rand(30, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    labels = model(x).argmax(1)
    ours = attack(model, x, labels, "l2")
    lower = certified_radius(model, x, labels, "l2", "crown", ours)
    wrapped = foolbox.PyTorchModel(model.float(), bounds=(-10.0, 10.0), device="cpu")
    raw, _, success = foolbox.attacks.L2DeepFoolAttack()(wrapped, x.float(), labels, epsilons=None)
    theirs = torch.linalg.vector_norm((raw - x.float()).double(), dim=1)[success]
    assert (theirs >= lower[success] - 1e-5).all()
    assert float((ours[success] / theirs).median()) < 1.0 + 1e-3
    assert math.isfinite(float(theirs.sum()))
