"""Variances over documents: the usual ones for rows of their own, wide enough for rows that resemble each other."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from analysis.memorization import clusters
from analysis.memorization.clusters import clustered_mean
from analysis.memorization.membership import separation


def test_single_rows_have_the_interval_of_student_and_welch() -> None:
    rng = np.random.default_rng(0)
    first, second = rng.normal(0, 1, 12), rng.normal(1, 3, 20)
    means = [clustered_mean(values, np.arange(len(values))) for values in (first, second)]
    assert means[0].half_width == pytest.approx(
        stats.t.interval(0.95, 11, scale=stats.sem(first))[1], rel=1e-12
    )
    ends = stats.ttest_ind(first, second, equal_var=False).confidence_interval(0.95)
    found, half = clusters.difference(*means)
    assert (found - half, found + half) == pytest.approx((ends.low, ends.high), rel=1e-12)


def test_repeated_rows_are_no_further_rows() -> None:
    values = np.random.default_rng(1).normal(size=9)
    single = clustered_mean(values, np.arange(9))
    repeated = clustered_mean(np.repeat(values, 7), np.repeat(np.arange(9), 7))
    assert repeated == pytest.approx(single, rel=1e-12)
    assert np.isnan(clustered_mean(values, np.zeros(9, dtype=np.int64)).half_width)


def test_the_interval_of_the_area_covers_it_where_rows_share_a_document() -> None:
    rng = np.random.default_rng(2)
    documents = np.repeat(np.arange(40), 8)
    covered, naive = 0, 0
    for _ in range(80):
        groups = [
            shift + (rng.normal(size=40)[documents] + rng.normal(size=320)) / np.sqrt(2)
            for shift in (0.5, 0.0)
        ]
        first, second = groups
        found = separation(first, second, documents, documents)
        of_rows = separation(first, second)
        covered += found.low <= 0.638163 <= found.high  # Φ(0.5/√2)
        naive += of_rows.low <= 0.638163 <= of_rows.high
    # Binomial with p = .95: 80 draws have a standard deviation of 2.4 %.
    assert covered / 80 > 0.95 - 0.073
    # Control: intervals over rows are too narrow here.
    assert naive / 80 < 0.85
