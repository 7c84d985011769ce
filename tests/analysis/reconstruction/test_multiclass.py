"""Several classes: a multiplier per image and other class, on a network for which all of them are known.

The network of one layer, Φ(x) = Wx, is homogeneous, and min ½‖W‖² with every margin at least 1 is the multiclass
support vector machine of Crammer and Singer (2001). Its solution comes from the closed form of one class
(`hard_margin`) on the vectors (e_y − e_j)⊗x, which shares nothing with `multipliers`.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from scipy.optimize import minimize

from analysis.reconstruction import alternatives, certificate, closed_form, multipliers, samples
from analysis.reconstruction.alternatives import KktPoint
from analysis.reconstruction.geometry import Geometry
from analysis.reconstruction.network import Network, all_margins, constraints, label_margins, outputs

CLASSES = [0, 1, 2]


def _machine() -> KktPoint:
    data = samples.load("digits", None, CLASSES, 5, 0)
    x, labels = torch.from_numpy(data.images), torch.from_numpy(data.labels)
    c = constraints("multiclass", x.new_zeros(len(x), 3), labels)
    rows = (c.unsqueeze(-1) * x[:, None, None, :]).flatten(2).flatten(0, 1)
    vector, mu = closed_form.hard_margin(rows.numpy())
    network = Network((torch.from_numpy(vector).view(3, -1),))
    lambdas = torch.from_numpy(mu).view(len(x), 2)
    return KktPoint("multiclass", network, x, labels, lambdas, certificate.data_span(x))


def test_the_machine_is_the_one_of_a_general_solver() -> None:
    """scipy's SLSQP on the weights inside the images' span, from 0."""
    point = _machine()
    basis = point.span.inside
    z = (point.x @ basis.T).numpy()
    c = constraints("multiclass", outputs(point.network, point.x), point.labels).numpy()

    def margins(w: object) -> object:
        return (c * (z @ torch.as_tensor(w).view(3, -1).numpy().T)[:, None]).sum(-1).ravel() - 1

    solved = minimize(
        lambda w: (0.5 * w @ w, w),
        torch.zeros(3 * len(basis), dtype=torch.float64).numpy(),
        jac=True,
        method="SLSQP",
        constraints={"type": "ineq", "fun": margins},
        options={"ftol": 1e-12, "maxiter": 300},
    )
    assert 2 * solved.fun == pytest.approx(point.network.squared_norm, rel=1e-6)


def test_every_margin_has_its_multiplier() -> None:
    point = _machine()
    margins = all_margins("multiclass", outputs(point.network, point.x), point.labels)
    assert float(margins.min()) == pytest.approx(1, abs=1e-10)
    # Some image is on the margin against both other classes, which one multiplier per image cannot express.
    assert bool((point.lambdas > 1e-6).all(1).any())
    assert multipliers.residual("multiclass", point.network, point.x, point.labels, point.lambdas) <= 1e-12
    found = multipliers.fit("multiclass", point.network, point.x, point.labels)
    assert found.residual <= 1e-12
    published = multipliers.fit("multiclass", point.network, point.x, point.labels, only_strongest=True)
    assert published.residual > 0.05
    # Euler: ‖θ‖² = L·Σλ·margin, L = 1.
    assert float((found.lambdas * margins).sum()) == pytest.approx(point.network.squared_norm, rel=1e-10)


@pytest.mark.parametrize("radius", [1.0, 1e3])
def test_splits_divide_all_multipliers_of_an_image_alike(radius: float) -> None:
    point = _machine()
    made = alternatives.null_split(point, radius, 0)
    assert made is not None
    assert alternatives.verify(point, made, is_exact=True).passed
    # Controls: another share for one class moves that class' mean; random directions move margins.
    uneven = made.lambdas.clone()
    uneven[:, 0] *= torch.cat([torch.full((15,), 0.5), torch.full((15,), 1.5)])
    assert not alternatives.verify(point, replace(made, lambdas=uneven), is_exact=True).passed
    assert not any(
        alternatives.verify(point, control, is_exact=True).passed
        for control in alternatives.controls(point, 0)
    )


def test_a_merge_needs_a_point_for_each_other_class() -> None:
    point = _machine()
    made = alternatives.merge(point)
    assert made is not None
    assert len(made.x) == 6
    row = alternatives.verify(point, made, is_exact=True)
    assert row.passed
    assert row.slackness <= 1e-10
    # Control: one mean per class, as with two classes, explains nothing.
    means, lambdas = [], []
    for label in point.labels.unique():
        own = point.lambdas * (point.labels == label).unsqueeze(1)
        means.append(own.sum(1) @ point.x / own.sum())
        lambdas.append(own.sum(0))
    labels = point.labels.unique()
    wrong = replace(
        made,
        x=torch.stack(means),
        labels=labels,
        lambdas=torch.stack(lambdas),
        parents=torch.tensor([0, 5, 10]),
    )
    assert not alternatives.verify(point, wrong, is_exact=True).passed


def test_a_split_along_the_margin_keeps_every_margin() -> None:
    point = _machine()
    made = alternatives.margin_split(point, 0)
    assert made is not None
    before = all_margins("multiclass", outputs(point.network, point.x), point.labels).repeat(2, 1)
    after = all_margins("multiclass", outputs(point.network, made.x), made.labels)
    torch.testing.assert_close(after, before, rtol=0, atol=1e-10)
    assert alternatives.verify(point, made, is_exact=True).passed


def test_a_certificate_of_several_classes() -> None:
    point = _machine()
    # A certificate needs a hidden layer; as many units as pixels twice, relu(x) − relu(−x) = x.
    eye = torch.eye(64, dtype=torch.float64)
    network = Network(
        (torch.cat([eye, -eye]), torch.cat([point.network.weights[0], -point.network.weights[0]], 1))
    )
    row = certificate.certify("multiclass", network, point.x, point.labels, Geometry("l2"))
    margins = label_margins("multiclass", outputs(network, point.x), point.labels)
    assert row.margin_min == pytest.approx(1, abs=1e-10)
    assert row.margin_max == pytest.approx(float(margins.max()), abs=1e-10)
    # The head alone is a KKT point, the network as a whole is not.
    assert 0.1 < row.residual < 1
    assert row.residual_clarke is None
