"""Statistics against scipy, closed testing, published sample sizes and simulated nulls."""

import re
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_allclose
from scipy import stats

from analysis.comparison.statistics import ALPHA, holm, interval, pairwise, power, seeds_needed, winners

COMPARISONS = 40_000
# Three standard errors of a rate of 5 % over 40,000 comparisons: chance alone passes it once in 700.
MONTE_CARLO = 3 * np.sqrt(ALPHA * (1 - ALPHA) / COMPARISONS)


def null(arms: int, seeds: int) -> np.ndarray:
    """Losses of equal arms: a large effect of the seed that all arms share, a small one of the run."""
    rng = np.random.default_rng(20240817)
    shared = rng.normal(0, 0.05, (COMPARISONS, 1, seeds))
    return 3.3 + shared + rng.normal(0, 0.004, (COMPARISONS, arms, seeds))


def closed_testing(p: np.ndarray) -> np.ndarray:
    """Holm as the closure of Bonferroni: the largest |S|·min p over the sets S with the hypothesis."""
    m = len(p)
    adjusted = np.zeros(m)
    for size in range(1, m + 1):
        for comparison in combinations(range(m), size):
            value = min(1.0, size * min(p[list(comparison)]))
            for i in comparison:
                adjusted[i] = max(adjusted[i], value)
    return adjusted


def test_pairs_agree_with_scipy() -> None:
    losses = np.random.default_rng(1).normal(3.3, 0.02, (4, 7))
    tests = pairwise(losses)
    assert tests.pairs == list(combinations(range(4), 2))
    for k, (i, j) in enumerate(tests.pairs):
        expected = stats.ttest_rel(losses[i], losses[j])
        bounds = expected.confidence_interval(0.95)
        # Both are fp64 sums of 7 terms: 1e-10 leaves room for their order.
        assert_allclose(tests.p[k], expected.pvalue, rtol=1e-10)
        assert_allclose(
            [tests.mean[k] - tests.half_width[k], tests.mean[k] + tests.half_width[k]], bounds, rtol=1e-9
        )


def test_pairs_use_the_seeds_that_both_have() -> None:
    losses = np.random.default_rng(2).normal(3.3, 0.02, (3, 6))
    losses[0, 1] = losses[1, 4] = np.nan
    tests = pairwise(losses)
    both = [0, 2, 3, 5]
    assert tests.n.tolist() == [4, 5, 5]
    assert_allclose(tests.p[0], stats.ttest_rel(losses[0, both], losses[1, both]).pvalue, rtol=1e-10)
    unpaired = np.asarray(stats.ttest_ind(losses[0, both], losses[1, both])[1])
    assert not np.isclose(tests.p[0], unpaired)


@pytest.mark.parametrize("n", [0, 1])
def test_one_common_seed_is_no_test(n: int) -> None:
    losses = np.full((2, 3), np.nan)
    losses[:, :n] = 3.0
    tests = pairwise(losses)
    assert np.isnan(tests.p[0])
    assert np.isnan(tests.p_holm[0])
    assert winners(tests, 2) == -1


def test_seeds_that_repeat_each_other_are_no_evidence() -> None:
    """A difference that is the same to the last bit comes from copies of one run, though t is infinite."""
    copies = pairwise([[3.3, 3.3, 3.3], [3.4, 3.4, 3.4]])
    assert np.isnan(copies.p[0])
    assert winners(copies, 2) == -1
    equal = pairwise([[3.3, 3.4], [3.3, 3.4]])
    assert equal.p[0] == 1.0


def test_holm_is_the_closure_of_bonferroni() -> None:
    rng = np.random.default_rng(3)
    for _ in range(50):
        p = rng.random(6) ** 3
        assert_allclose(holm(p), closed_testing(p), rtol=1e-12)
    p = rng.random((5, 4, 3))
    assert_allclose(holm(p)[2, 1], closed_testing(p[2, 1]), rtol=1e-12)


def test_holm_counts_what_could_not_be_tested() -> None:
    assert_allclose(holm([0.01, np.nan, 0.02]), [0.03, np.nan, 0.04])


def test_interval_agrees_with_scipy() -> None:
    values = np.random.default_rng(4).normal(3.3, 0.02, 5)
    found = interval([*values, np.nan])
    low, high = stats.t.interval(0.95, 4, values.mean(), stats.sem(values))
    assert found.n == 5
    assert_allclose([found.mean - found.half_width, found.mean + found.half_width], [low, high], rtol=1e-12)
    assert np.isnan(interval([3.3]).half_width)
    assert interval([]).n == 0


# Sample sizes of G*Power 3.1, "t tests: difference between two dependent means", two-sided, power 0.80.
@pytest.mark.parametrize(("effect", "alpha", "n"), [(0.2, 0.05, 199), (0.5, 0.05, 34), (0.8, 0.05, 15)])
def test_seeds_needed_agree_with_published_sample_sizes(effect: float, alpha: float, n: int) -> None:
    assert seeds_needed(sd=0.01 / effect, difference=0.01, alpha=alpha) == n


def test_the_table_in_the_docs_is_what_the_formula_gives() -> None:
    page = Path(__file__).parents[3] / "docs" / "comparing_fairly.md"
    rows = re.findall(r"^\| (0\.\d+) \| (\d+) \| (\d+) \| (\d+) \|$", page.read_text(encoding="utf-8"), re.M)
    assert len(rows) == 5
    for sd, *counts in rows:
        assert [int(n) for n in counts] == [seeds_needed(float(sd), alpha=ALPHA / m) for m in (1, 3, 6)]


def test_power_agrees_with_a_simulation() -> None:
    rng = np.random.default_rng(5)
    draws = rng.normal(0.01, 0.012, (20_000, 8))
    rate = (np.asarray(stats.ttest_1samp(draws, 0, axis=1)[1]) < 0.01).mean()
    # Three standard errors of a rate near 0.3 over 20,000 draws.
    assert_allclose(power(8, 0.01, 0.012, alpha=0.01), rate, atol=3 * np.sqrt(0.25 / 20_000))


def test_seeds_needed_has_ends() -> None:
    assert seeds_needed(0.0) == 2
    assert seeds_needed(float("nan")) is None
    assert seeds_needed(10.0) is None
    assert seeds_needed(1e-5) == 2


@pytest.mark.parametrize(("arms", "seeds"), [(2, 2), (2, 3), (4, 3), (4, 5)])
def test_equal_arms_get_a_winner_no_more_often_than_alpha(arms: int, seeds: int) -> None:
    tests = pairwise(null(arms, seeds))
    assert (winners(tests, arms) >= 0).mean() <= ALPHA + MONTE_CARLO
    shown = (np.nan_to_num(tests.p_holm, nan=1) < ALPHA).any(-1).mean()
    assert shown <= ALPHA + MONTE_CARLO, (
        "the family-wise error rate of all statements, not only of the winner"
    )


def test_control_uncorrected_p_values_show_differences_too_often() -> None:
    tests = pairwise(null(4, 5))
    assert (tests.p < ALPHA).any(-1).mean() > 3 * ALPHA


def test_control_a_normal_quantile_names_a_winner_too_often() -> None:
    """A z-test with the spread of three seeds: what "two standard errors apart" amounts to."""
    tests = pairwise(null(2, 3))
    z = 2 * stats.norm.sf(np.abs(tests.mean) / (tests.sd / np.sqrt(tests.n)))
    assert (winners(tests, 2, p=z) >= 0).mean() > 3 * ALPHA


def test_control_an_unpaired_test_misses_what_the_paired_one_shows() -> None:
    losses = null(2, 5)[:2000]
    losses[:, 1] += 0.02
    paired = (winners(pairwise(losses), 2) == 0).mean()
    unpaired = (np.asarray(stats.ttest_ind(losses[:, 0], losses[:, 1], axis=-1)[1]) < ALPHA).mean()
    assert paired > 0.95
    assert unpaired < 0.2


def test_a_winner_must_beat_every_other_arm() -> None:
    rng = np.random.default_rng(6)
    noise = rng.normal(0, 0.001, (3, 5))
    clear = np.array([[3.2], [3.3], [3.4]]) + noise
    tied = np.array([[3.2], [3.2], [3.4]]) + noise
    assert winners(pairwise(clear), 3) == 0
    assert winners(pairwise(clear[::-1]), 3) == 2
    assert winners(pairwise(tied), 3) == -1
