"""Lemma 3.2: closed forms, our own iterations, and the control that must fail."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from analysis.paper.theory import polar_bound
from analysis.paper.theory.polar_bound import ITERATIONS, MUON, bound, scan
from optimizers.linalg import newton_schulz as rules

BY_KEY = {iteration.key: iteration for iteration in ITERATIONS}


def test_the_coefficients_are_those_of_the_rules() -> None:
    assert polar_bound.JORDAN == rules.JORDAN
    assert polar_bound.CUBIC == rules.CUBIC
    assert polar_bound.TAYLOR == rules.TAYLOR


def test_matrices_are_iterated_as_the_rules_do() -> None:
    a, _ = polar_bound.matrix(polar_bound.geometric(37.0, 6), 10)
    tensor = torch.from_numpy(a)
    theirs = {
        "muon": rules.newton_schulz(tensor, dtype=torch.float64),
        "cubic": rules.cubic(tensor, dtype=torch.float64, norm="spectral"),
        "cubic_frobenius": rules.cubic(tensor, dtype=torch.float64),
    }
    for key, expected in theirs.items():
        np.testing.assert_allclose(BY_KEY[key].apply(a, 5), expected.numpy(), atol=1e-13)


def test_errors_follow_from_singular_values() -> None:
    for row in polar_bound.bound_rows((1.5, 40.0), columns=20):
        assert row.deviation < 1e-13


def test_the_recursion_of_the_proof_attains_the_bound() -> None:
    # 1 - (2s - s²) = (1 - s)², hence (1 - s)^(2^i).
    for kappa in (1.2, 3.0, 100.0):
        for steps in (0, 1, 4):
            errors = BY_KEY["inverse"].direction_errors(polar_bound.geometric(kappa), steps)
            assert errors.max() == pytest.approx(float(bound(kappa, steps)), rel=1e-9)


def test_where_the_bound_holds() -> None:
    found = {key: scan(iteration, points=41) for key, iteration in BY_KEY.items()}
    assert {key for key, result in found.items() if result.holds} == {"inverse", "cubic", "taylor"}
    # The control: Muon's coefficients do not converge, so that a bound that vanishes at κ = 1 is violated there.
    muon = found["muon"]
    assert muon.lowest < 1.01
    assert muon.excess > 0.5
    assert muon.settles > 0.1
    assert muon.highest < 10.0  # above, the bound is close to 1, and says nothing
    assert found["cubic_frobenius"].settles < 1e-12


def test_the_frobenius_bound_needs_the_side_instead_of_the_rank() -> None:
    found = polar_bound.rank_factor()
    # By hand: 63 errors of 0.9, and one of 0.
    assert found.error == pytest.approx(0.9 * math.sqrt(63))
    assert found.claimed == pytest.approx(0.9)
    assert found.claimed < found.error < found.with_side


def test_the_band_of_muon() -> None:
    band = polar_bound.band()
    inside = MUON.polynomial(np.geomspace(band.start, 1.0, 40_001), 5)
    assert inside.min() >= band.floor - 1e-6
    assert inside.max() <= band.top + 1e-6
    assert MUON.polynomial(np.array([0.9 * band.start]), 5)[0] < band.floor
    # No spectrum with a κ up to the limit has a direction below the band, whatever its shape.
    limit = band.largest_kappa(32)
    for spectrum in polar_bound.SPECTRA.values():
        values = spectrum(limit * (1 - 1e-9), side=32)
        assert MUON.scaled(values).min() >= band.start * (1 - 1e-9)
        assert MUON.direction_errors(values, 5).max() <= band.largest_error + 1e-6
    # The limit is attained by the spectrum that is flat but for one direction.
    assert MUON.scaled(polar_bound.one_small(1.1 * limit, 32)).min() < band.start
