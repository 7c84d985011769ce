"""Tests over seeds and examples: calibration on simulated classifiers, closed forms, public libraries."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.testing import assert_allclose
from scipy import stats
from sklearn.metrics import cohen_kappa_score

from analysis.comparison import resampling
from analysis.comparison.examples import agreement, mcnemar_p
from analysis.comparison.statistics import (
    ALPHA,
    ExampleVariance,
    examples_needed,
    pairwise,
    two_level,
    winners,
    with_examples,
)
from harness.tasks.metrics import score

EXAMPLES = 277
"""Validation examples of RTE."""
COMPARISONS = 1000
# Three standard errors of a rate of 5 % over 1000 comparisons.
MONTE_CARLO = 3 * np.sqrt(ALPHA * (1 - ALPHA) / COMPARISONS)
WORLDS = {
    "examples that some optimizer always gets right": {"arm": 2.0, "seed": 0.05},
    "much noise of single runs": {"arm": 0.3, "seed": 0.6},
    "noise alone": {"arm": 0.0, "seed": 0.0},
}
"""Standard deviations of the logit of a right answer: of the optimizer on an example, and of a run as a whole."""


def simulate(seeds: int, arm: float, seed: float, points: float = 0.0) -> np.ndarray:
    """Which answers are right, shape (comparisons, 2, seeds, examples): two optimizers near 80 %.

    The first is better by ``points`` (a fraction) in expectation over examples and seeds. An example has a difficulty
    (standard deviation 1.5 of its logit) that both share.
    """
    rng = np.random.default_rng([20260101, seeds, round(1000 * points)])
    z = np.random.default_rng(0).normal(size=100_000).astype(np.float32)
    spread, grid = np.sqrt(1.5**2 + arm**2 + seed**2), np.linspace(0, 6, 121)
    reached = np.array([np.mean(1 / (1 + np.exp(-(mean + spread * z[:20_000])))) for mean in grid])
    means = np.interp([0.8 + points, 0.8], reached, grid).reshape(1, 2, 1, 1).astype(np.float32)
    shape = (COMPARISONS, 2, seeds, EXAMPLES)

    def normal(*axes: int) -> np.ndarray:
        return rng.standard_normal(
            [shape[axis] if axis in axes else 1 for axis in range(4)], dtype=np.float32
        )

    logit = means + 1.5 * normal(0, 3) + arm * normal(0, 1, 3) + seed * normal(0, 1, 2)
    return rng.random(shape, dtype=np.float32) < 1 / (1 + np.exp(-logit))


def variance(right: np.ndarray) -> ExampleVariance:
    """Closed form of the bootstrap's variances: those of a mean over examples."""
    difference = right[:, 0].astype(np.float32) - right[:, 1]
    shared = difference.mean(1).var(-1, ddof=1) / EXAMPLES
    single = (difference.var(-1, ddof=1) / EXAMPLES).mean(-1)
    return ExampleVariance(shared[:, None], single[:, None], EXAMPLES)


def named(right: np.ndarray) -> np.ndarray:
    """The winner of each comparison, by the code of the verdict."""
    tests = with_examples(pairwise(right.mean(-1)), variance(right))
    return winners(tests, 2, sign=1)


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("seeds", [2, 5])
def test_equal_optimizers_get_a_winner_no_more_often_than_alpha(seeds: int, world: str) -> None:
    assert (named(simulate(seeds, **WORLDS[world])) >= 0).mean() <= ALPHA + MONTE_CARLO


def test_ten_points_are_found_with_five_seeds_and_the_better_one_is_named() -> None:
    """Power at a difference of 10 points: 0.98 with 5 seeds, 0.69 with 3 (docs/comparing_fairly.md)."""
    found = named(simulate(5, arm=1.0, seed=0.2, points=0.1))
    assert (found == 0).mean() > 0.97
    assert (found == 1).mean() == 0
    assert 0.5 < (named(simulate(3, arm=1.0, seed=0.2, points=0.1)) == 0).mean() < 0.9


def test_control_seeds_alone_name_a_winner_too_often() -> None:
    """The examples favour one optimizer by chance, the same in every seed."""
    right = simulate(5, **WORLDS["examples that some optimizer always gets right"])
    assert (winners(pairwise(right.mean(-1)), 2, sign=1) >= 0).mean() > 3 * ALPHA


def test_control_examples_alone_and_an_unpaired_test_name_a_winner_too_often() -> None:
    right = simulate(5, **WORLDS["much noise of single runs"])
    tests = pairwise(right.mean(-1))
    by_examples = 2 * stats.t.sf(np.abs(tests.mean) / np.sqrt(variance(right).shared), EXAMPLES - 1)
    assert (winners(tests, 2, sign=1, p=by_examples) >= 0).mean() > 3 * ALPHA
    shares = right.mean((-1, -2))
    error = np.sqrt((shares * (1 - shares)).sum(-1, keepdims=True) / (5 * EXAMPLES))
    pooled = 2 * stats.norm.sf(np.abs(tests.mean) / error)
    assert (winners(tests, 2, sign=1, p=pooled) >= 0).mean() > 3 * ALPHA


def test_the_interval_is_never_narrower_than_over_the_seeds_and_needs_two() -> None:
    rng = np.random.default_rng(3)
    results = rng.normal(0.8, 0.02, (200, 2, 4))
    tests = pairwise(results)
    shared = rng.exponential(1e-4, (200, 1))
    both = with_examples(tests, ExampleVariance(shared, 2 * shared, EXAMPLES))
    assert (both.half_width >= tests.half_width * (1 - 1e-12)).all()
    assert (both.p >= tests.p * (1 - 1e-12)).all()
    half, p = two_level(1, 0.1, np.nan, ExampleVariance(np.array(1e-4), np.array(1e-4), EXAMPLES))
    assert np.isnan([half, p]).all()


def test_many_seeds_leave_the_variance_of_the_examples() -> None:
    half, _ = two_level(10_000, 0.1, 0.01, ExampleVariance(np.array(4e-4), np.array(4e-4), 1000))
    # Variance 4e-4 and 1e-8 with 999 degrees of freedom.
    assert_allclose(half, stats.t.ppf(0.975, 999) * np.sqrt(4e-4 + 1e-8), rtol=1e-3)


def test_examples_needed_are_those_of_the_closed_form() -> None:
    """One pair whose examples differ with variance 0.2: n = 0.2·((1.960 + 0.842)/0.01)²."""
    shared = np.array([0.2 / EXAMPLES])
    assert examples_needed(ExampleVariance(shared, shared, EXAMPLES)) == np.ceil(
        0.2 * (2.8015852 / 0.01) ** 2
    )
    assert examples_needed(ExampleVariance(np.array([0.0]), np.array([0.0]), EXAMPLES)) is None


def test_resamples_of_a_mean_have_its_standard_error() -> None:
    rng = np.random.default_rng(4)
    difference = rng.integers(-1, 2, EXAMPLES).astype(float)
    draws = np.concatenate([resampling.share(counts, difference) for counts in resampling.resample(EXAMPLES)])
    assert len(draws) == resampling.RESAMPLES
    scipys = stats.bootstrap(
        (difference,), np.mean, n_resamples=5000, rng=1, method="percentile"
    ).standard_error
    closed = difference.std() / np.sqrt(EXAMPLES)
    # A standard deviation of n draws is known to 1/sqrt(2n): 1.6 % and 1 %, three of them.
    assert_allclose(draws.std(ddof=1), closed, rtol=3 / np.sqrt(2 * len(draws)))
    assert_allclose(draws.std(ddof=1), scipys, rtol=3 * np.hypot(1 / np.sqrt(2 * len(draws)), 0.01))
    again = np.concatenate([resampling.share(counts, difference) for counts in resampling.resample(EXAMPLES)])
    assert (again == draws).all()


@pytest.mark.parametrize(
    ("name", "labels"),
    [
        ("f1", ["no", "yes"]),
        ("f1", ["yes", "no"]),
        ("f1", ["a", "b", "c"]),
        ("matthews", ["no", "yes"]),
        ("matthews", ["a", "b", "c"]),
        ("pearson", None),
        ("spearman", None),
    ],
)
def test_a_resampled_metric_is_the_metric_of_the_drawn_examples(name: str, labels: list[str] | None) -> None:
    rng = np.random.default_rng(5)
    if labels is None:
        truth = rng.integers(0, 6, 40)
        references, predictions = (
            [str(v) for v in truth],
            [repr(float(v)) for v in truth + rng.integers(0, 5, 40)],
        )
    else:
        truth = rng.integers(0, len(labels), 40)
        guess = np.where(rng.random(40) < 0.6, truth, rng.integers(0, len(labels), 40))
        references, predictions = [labels[k] for k in truth], [labels[k] for k in guess]
    counts = next(resampling.resample(40, 30, seed=6))
    values = resampling.resampled_score(name, counts, references, predictions, labels)
    for row, value in zip(counts, values, strict=True):
        drawn = np.repeat(np.arange(40), row.astype(int))
        expected = score(name, [references[k] for k in drawn], [predictions[k] for k in drawn], labels)
        # Sums of 40 terms in fp64, in another order.
        assert_allclose(value, expected, atol=1e-12)


@pytest.mark.parametrize("name", ["matthews", "f1", "pearson", "spearman"])
def test_a_constant_prediction_is_zero_in_every_resample(name: str) -> None:
    is_number = name in ("pearson", "spearman")
    references = ["0", "1"] * 10 if is_number else ["no", "yes"] * 10
    predictions = ["0.3"] * 20 if is_number else ["no"] * 20
    counts = next(resampling.resample(20, 50))
    values = resampling.resampled_score(
        name, counts, references, predictions, None if is_number else ["no", "yes"]
    )
    assert (values == 0).all()


@pytest.mark.parametrize(("b", "c"), [(0, 0), (0, 1), (5, 5), (12, 3), (40, 70)])
def test_mcnemar_is_that_of_statsmodels(b: int, c: int) -> None:
    tables = pytest.importorskip("statsmodels.stats.contingency_tables", reason="statsmodels is a test tool")
    assert_allclose(mcnemar_p(b, c), tables.mcnemar([[50, b], [c, 20]], exact=True).pvalue, rtol=1e-12)


def test_agreement_is_cohens() -> None:
    rng = np.random.default_rng(7)
    first = [str(v) for v in rng.integers(0, 3, 100)]
    second = [a if rng.random() < 0.7 else str(rng.integers(0, 3)) for a in first]
    share, kappa = agreement(first, second)
    assert share == np.mean([a == b for a, b in zip(first, second)])
    assert_allclose(kappa, cohen_kappa_score(first, second), rtol=1e-12)
    assert np.isnan(agreement(["a"] * 5, ["a"] * 5)[1])
