"""The exact fixture: acceptance 1 to 3, and which pairs have one."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from analysis.reconstruction import alternatives, certificate, closed_form, multipliers, samples
from analysis.reconstruction.alternatives import Alternative, VerifiedAlternative
from analysis.reconstruction.geometry import Geometry
from analysis.reconstruction.network import flat
from harness.errors import InputError
from tests.analysis.reconstruction.problems import exact_problem, fixture, pair


def _verified(made: Alternative | None) -> VerifiedAlternative:
    assert made is not None
    return alternatives.verify(exact_problem(), made, is_exact=True)


def test_the_closed_form_is_a_kkt_point() -> None:
    found = certificate.certify("binary", fixture().network, pair().x, pair().labels, Geometry("l2"))
    # Rounding of sums of 64 products, measured 4e-16; the figures are those of the derivation.
    assert found.residual <= 1e-12
    assert abs(found.margin_min - 1) <= 1e-10
    assert abs(found.squared_norm - 2 * found.lambda_sum) <= 1e-10
    assert found.squared_norm == pytest.approx(3.6471, abs=1e-3)
    assert (found.rank, found.null_dimension, found.support) == (29, 35, 15)
    assert found.slackness <= 1e-14
    assert found.alignment_l2 == pytest.approx(1, abs=1e-12)


def test_least_squares_recovers_the_multipliers() -> None:
    found = multipliers.fit("binary", fixture().network, pair().x, pair().labels)
    torch.testing.assert_close(found.lambdas, fixture().lambdas, rtol=0, atol=1e-12)


def test_the_margin_vector_is_that_of_a_general_solver() -> None:
    """Independent oracle: the same quadratic programme by sequential quadratic programming."""
    own = pair().samples.images[pair().samples.labels == 1]
    u, mu = closed_form.hard_margin(own)
    assert (mu >= 0).all()
    solved = minimize(
        lambda v: 0.5 * v @ v,
        np.linalg.lstsq(own, np.ones(len(own)), rcond=None)[0],
        jac=lambda v: v,
        constraints={"type": "ineq", "fun": lambda v: own @ v - 1, "jac": lambda v: own},
        method="SLSQP",
        options={"ftol": 1e-14, "maxiter": 500},
    )
    # SLSQP stops at 1e-14 of the objective: half as many digits in u.
    np.testing.assert_allclose(u, solved.x, atol=1e-6)
    assert np.linalg.norm(u) == pytest.approx(0.910570, abs=1e-6)


def test_a_perturbed_network_is_no_kkt_point() -> None:
    network = fixture().network
    noise = torch.randn(
        network.weights[0].shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    moved = network.with_first(network.weights[0] + 1e-3 * noise)
    assert multipliers.fit("binary", moved, pair().x, pair().labels).residual > 1e-3


@pytest.mark.parametrize("radius", [1.0, 10.0, 1e3, 1e6])
def test_splits_of_any_radius_explain_the_same_weights(radius: float) -> None:
    problem = exact_problem()
    for make in alternatives.BY_RADIUS:
        row = _verified(make(problem, radius, 0))
        # Rounding of x + αν: 1e-16 of the radius in every pre-activation.
        assert row.residual <= 1e-12 * max(1, radius), row.kind
        assert abs(row.margin_min - 1) <= 1e-10 * max(1, radius), row.kind
        assert row.nn_distance >= 0.5 * radius, row.kind
        assert row.points == 60
        assert row.passed


def test_controls_fail_at_every_radius_at_which_splits_pass() -> None:
    """Random directions lose the margin from the first step and explode, where exact splits are flat."""
    radii = [1.0, 10.0, 1e3, 1e6]
    rows = [_verified(made) for made in alternatives.controls(exact_problem(), 0, radii)]
    assert [row.radius for row in rows] == [0.05, 1.0, 10.0, 100.0, 1e3, 1e6]
    assert not any(row.passed for row in rows)
    assert all(row.margin_min < 1 - 1e-3 for row in rows)
    assert rows[-1].residual > 1e4
    assert rows[-1].margin_min < -1e4


def test_a_lopsided_split() -> None:
    problem = exact_problem()
    directions = problem.span.outside[:1].expand(30, -1)
    row = _verified(alternatives.split(problem, "null_split", 10.0, directions, ratio=0.5))
    assert row.residual <= 1e-11
    assert row.nn_distance >= 5 - 1e-9


def test_a_class_merges_to_one_point() -> None:
    made = alternatives.merge(exact_problem())
    row = _verified(made)
    assert made is not None
    assert row.points == 2
    assert row.residual <= 1e-12
    assert abs(row.margin_min - 1) <= 1e-10
    for point, mass, u in zip(made.x, made.lambdas, fixture().directions):
        # u/‖u‖² with λ = ‖u‖, by the derivation.
        torch.testing.assert_close(point, u / u.square().sum(), rtol=0, atol=1e-12)
        assert float(mass) == pytest.approx(float(u.norm()), abs=1e-12)


def test_random_directions_must_fail() -> None:
    shifted, broken = (_verified(made) for made in alternatives.controls(exact_problem(), 0))
    assert broken.residual > 1
    assert broken.margin_min < 0
    assert shifted.residual <= 1e-12
    assert shifted.margin_min < 1 - 1e-3
    assert not broken.passed
    assert not shifted.passed


@pytest.mark.parametrize("defect", ["mass", "mean", "label"])
def test_wrong_multipliers_are_seen(defect: str) -> None:
    """A split whose λ, whose λ-weighted mean, or whose labels are wrong explains nothing."""
    made = alternatives.null_split(exact_problem(), 10.0, 0)
    assert made is not None
    changed = {
        "mass": {"lambdas": made.lambdas * 1.01},
        "mean": {"x": made.x * 1.01},
        "label": {"labels": -made.labels},
    }[defect]
    assert not _verified(Alternative(**{**made.__dict__, **changed})).passed


def test_thirty_five_of_the_pairs_of_digits_have_a_closed_form() -> None:
    found = 0
    for one, other in itertools.combinations(range(10), 2):
        data = samples.load("digits", None, [one, other], 15, None)
        try:
            made = closed_form.build(data.images, data.labels, 8)
        except InputError:
            continue
        found += 1
        x, labels = torch.from_numpy(data.images), torch.from_numpy(data.labels)
        assert multipliers.residual("binary", made.network, x, labels, made.lambdas) <= 1e-12
    assert found == 35


def test_a_pair_without_a_closed_form_is_refused() -> None:
    data = samples.load("digits", None, [8, 9], 15, None)
    with pytest.raises(InputError, match=r"classes: .* closed-form .* fix: classes=\[0,4\]"):
        closed_form.build(data.images, data.labels, 8)


def test_no_two_neurons_of_the_fixture_are_equal() -> None:
    rows = fixture().network.weights[0]
    assert len({tuple(row.tolist()) for row in rows}) == len(rows)
    assert float(flat(fixture().network.parameters).square().sum()) == pytest.approx(3.647098, abs=1e-6)
