"""Lemma 3.1: the simulation against closed forms, and its conditions."""

from __future__ import annotations

import math

import numpy as np
import pytest

from analysis.paper.theory import moment_rank
from analysis.paper.theory.moment_rank import ReversibleLayer


def diagonal(rates: np.ndarray, start: np.ndarray) -> ReversibleLayer:
    """A layer whose eigenmatrices are the unit matrices E_ij, with ηλ_ij = rates[i, j] ≥ 0."""
    side = len(rates)
    left = np.array([np.diag(np.eye(side)[i]) for i in range(side)]) * side
    return ReversibleLayer(left, np.array([np.diag(row) for row in rates]), start)


@pytest.mark.parametrize("beta", [0.0, 0.9, 0.97])
def test_every_entry_of_the_moment_has_its_own_closed_form(beta: float) -> None:
    rates = np.array([[0.02, 0.3], [0.5, 0.05]])
    start = np.array([[1.0, -2.0], [0.5, 3.0]])
    layer = diagonal(rates, start)
    # By hand: entry (i, j) is Σ β^(t-s) (1 - ηλ_ij)^s ηλ_ij x_ij.
    for t in (0, 1, 7, 60):
        powers = sum(beta ** (t - s) * (1.0 - rates) ** s for s in range(t + 1))
        by_hand = powers * rates * start
        found = moment_rank.moment_at(layer, beta, t)
        np.testing.assert_allclose(found / found[0, 0], by_hand / by_hand[0, 0], rtol=1e-10)
        share = moment_rank.simulate(layer, beta, {t})[t]
        assert share == pytest.approx(moment_rank.residual_share(by_hand), rel=1e-9)


def test_the_bound_is_attained_where_the_second_direction_shares_no_row_or_column() -> None:
    layer = diagonal(np.array([[0.02, 0.3], [0.5, 0.05]]), np.ones((2, 2)))
    bound = moment_rank.decay_per_step(layer, 0.9)
    assert bound == pytest.approx((0.95 / 0.98) ** 2, rel=1e-12)
    assert moment_rank.fitted_decay(layer, 0.9) == pytest.approx(bound, rel=1e-3)
    # A moment that forgets more slowly than the second direction sets the pace itself.
    assert moment_rank.decay_per_step(layer, 0.97) == pytest.approx((0.97 / 0.98) ** 2, rel=1e-12)


def test_one_term_decays_faster_than_the_bound() -> None:
    layer = moment_rank.single_term(0.05, 6)
    fitted = moment_rank.fitted_decay(layer, 0.0)
    assert fitted is not None
    assert fitted < moment_rank.decay_per_step(layer, 0.0) - 1e-3


def test_the_unstated_condition_decides() -> None:
    layer = moment_rank.single_term(0.08, 6)
    holds, fails = (moment_rank.row("one term", layer, beta, 600) for beta in (0.9, 0.95))
    assert holds.holds
    assert not fails.holds
    assert holds.shares[600] < 1e-3
    assert max(holds.deviation, fails.deviation) < 1e-12
    # It keeps the matrix Σ g_j/(β - a_j) V_j, whose share is far from 0.
    assert fails.shares[600] == pytest.approx(fails.limit, rel=1e-6)
    assert fails.limit > 0.3
    assert fails.fitted_decay is None


def test_a_first_direction_of_higher_rank_stays() -> None:
    layer = moment_rank.several_terms(4, 6)
    found = moment_rank.row("4 terms", layer, 0.5, 4000)
    assert found.holds
    assert found.shares[4000] == pytest.approx(found.limit, abs=1e-6)
    assert found.limit > 1e-3


def test_equal_rates_have_their_limit() -> None:
    # (a^(t+1) - β^(t+1))/(a - β) → (t + 1) a^t, here over a^t.
    close = moment_rank.weights(np.array([0.9, 0.9 - 1e-12, 0.9 - 1e-7]), 0.9, 50)
    np.testing.assert_allclose(close, 51.0, rtol=1e-5)


def test_the_share_is_that_of_an_svd() -> None:
    matrix = np.diag([3.0, 2.0, 1.0])
    assert moment_rank.residual_share(matrix) == pytest.approx(5.0 / 14.0)
    assert math.isclose(moment_rank.residual_share(np.outer([1.0, 2.0], [3.0, 1.0])), 0.0, abs_tol=1e-30)
