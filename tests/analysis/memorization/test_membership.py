"""Separation of members against brute force: the area, DeLong's variance, its interval's coverage, Min-K %."""

from __future__ import annotations

import math

import numpy as np
import pytest

from analysis.memorization.membership import min_k_scores, separation


def test_area_and_interval_are_those_of_all_pairs() -> None:
    rng = np.random.default_rng(0)
    # Rounded, so that there are ties.
    members, others = rng.normal(0.7, 1, 60).round(1), rng.normal(0, 1, 90).round(1)
    pairs = (members[:, None] > others) + 0.5 * (members[:, None] == others)
    found = separation(members, others)
    assert found.auc == pytest.approx(pairs.mean(), abs=1e-12)
    variance = pairs.mean(1).var(ddof=1) / 60 + pairs.mean(0).var(ddof=1) / 90
    logit = math.log(found.auc / (1 - found.auc))
    half = 1.959964 * math.sqrt(variance) / (found.auc * (1 - found.auc))
    assert math.log(found.low / (1 - found.low)) == pytest.approx(logit - half, abs=1e-5)
    assert math.log(found.high / (1 - found.high)) == pytest.approx(logit + half, abs=1e-5)
    # No other row scores at least the threshold: one in 90 is more than 1 %.
    assert found.tpr == pytest.approx((members > others.max()).mean())


def test_the_interval_covers_the_true_area() -> None:
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(200):
        found = separation(rng.normal(0.5, 1, 80), rng.normal(0, 1, 80))
        covered += found.low <= 0.638163 <= found.high  # Φ(0.5/√2)
    # Binomial with p = .95: 200 draws have a standard deviation of 1.5 %.
    assert 0.95 - 0.046 < covered / 200 < 0.95 + 0.046


def test_perfect_separation_has_no_variance() -> None:
    assert separation(np.array([2.0, 3.0]), np.array([0.0, 1.0])) == (1.0, 1.0, 1.0, 1.0)


def test_min_k_is_the_mean_of_the_least_likely_tokens() -> None:
    log_probs = np.random.default_rng(2).normal(size=(5, 10))
    expected = [np.mean(sorted(row)[:2]) for row in log_probs.tolist()]
    np.testing.assert_allclose(min_k_scores(log_probs, 0.2), expected)
    np.testing.assert_allclose(min_k_scores(log_probs, 1.0), log_probs.mean(1))
    assert min_k_scores(log_probs, 0.001).tolist() == log_probs.min(1).tolist()
