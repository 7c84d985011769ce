"""Estimators over external evidence: on synthetic truth, against other implementations, each with a control."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from analysis.comparison import document, profiles, seed_noise, statistics, track3
from tests.analysis.runs.logs.synthetic import write_arm

RNG = np.random.default_rng(7)


def test_welch_has_the_error_rate_that_it_states_where_spreads_differ() -> None:
    """4 and 12 runs with spreads 3:1: Welch keeps 5 %; the pooled t-test, which assumes equal spreads, does not."""
    sims = 300
    a, b = RNG.normal(0, 3, (sims, 4)), RNG.normal(0, 1, (sims, 12))
    rejected = [float(statistics.welch(_ragged(x, y)).p[0]) < 0.05 for x, y in zip(a, b, strict=True)]
    pooled = np.asarray(stats.ttest_ind(a, b, axis=1)[1], float) < 0.05
    assert abs(np.mean(rejected) - 0.05) < 4 * math.sqrt(0.05 * 0.95 / sims)
    assert np.mean(pooled) > 0.15, "the control"


def _ragged(*samples: np.ndarray) -> np.ndarray:
    table = np.full((len(samples), max(map(len, samples))), np.nan)
    for row, sample in zip(table, samples, strict=True):
        row[: len(sample)] = sample
    return table


def test_welch_does_not_test_what_does_not_vary() -> None:
    tests = statistics.welch([[1.0, 1.0, 1.0], [2.0, 2.0, np.nan], [1.0, np.nan, np.nan]])
    assert np.isnan(tests.p).all()
    assert tests.n.tolist() == [2, 1, 1]
    assert tests.mean.tolist() == [-1, 0, 1]


@pytest.mark.parametrize(("n", "difference"), [(3, 0.002), (10, 0.001), (25, 0.0005)])
def test_power_of_two_samples_is_that_of_statsmodels(n: int, difference: float) -> None:
    power = pytest.importorskip("statsmodels.stats.power")
    oracle = power.TTestIndPower().power(difference / 0.0011, n, 0.05)
    assert statistics.power_of_two_samples(n, difference, 0.0011) == pytest.approx(oracle, abs=1e-6)


def test_runs_needed_is_the_fewest() -> None:
    n = statistics.runs_needed(0.0011, 0.001)
    assert n is not None
    assert (
        statistics.power_of_two_samples(n, 0.001, 0.0011)
        >= 0.8
        > statistics.power_of_two_samples(n - 1, 0.001, 0.0011)
    )


def test_the_pooled_deviation_covers_the_truth() -> None:
    covered = 0
    for _ in range(200):
        found = seed_noise.pooled([RNG.normal(mean, 2.0, n) for mean, n in ((0, 3), (9, 5), (-4, 1), (2, 8))])
        assert found.freedom == 13
        covered += found.low <= 2.0 <= found.high
    assert abs(covered / 200 - 0.95) < 4 * math.sqrt(0.05 * 0.95 / 200)
    # The control: deviations around one mean for all arms are far off.
    assert np.std(np.concatenate([RNG.normal(mean, 2.0, 50) for mean in (0, 9, -4)]), ddof=1) > 4


def test_only_the_arm_that_varies_more_is_named() -> None:
    arms = {f"arm{i}": RNG.normal(0, 1, 8) for i in range(20)}
    assert seed_noise.wide_arms(arms) == {}
    arms["mixed"] = np.concatenate([RNG.normal(-4, 1, 6), RNG.normal(4, 1, 6)])
    assert list(seed_noise.wide_arms(arms)) == ["mixed"]
    assert seed_noise.equal_spreads(list(arms.values())) < 0.01


def test_the_rule_of_track_3_gives_the_published_figures() -> None:
    """The README of 20260506_trustlight: eight losses at step 3125, z = 3.3914, p = 3.48e-4."""
    losses = [3.27918, 3.27785, 3.27948, 3.28002, 3.27822, 3.27683, 3.27830, 3.27765]
    found = track3.rule(losses)
    assert (found.n, round(found.mean, 8)) == (8, 3.27844125)
    assert round(found.margin, 8) == 0.00440881
    assert round(found.z, 4) == 3.3914
    assert found.p == pytest.approx(3.48e-4, rel=2e-3)
    assert found.passed
    assert found.p_t == pytest.approx(stats.ttest_1samp(losses, 3.28, alternative="less")[1])


def test_the_rule_of_track_3_refuses_as_often_as_it_states() -> None:
    """At the target it passes in 0.1 % of the cases; a spread above its σ breaks that (the control)."""
    sims = 20_000
    shares = []
    for sigma in (track3.SIGMA, 2 * track3.SIGMA):
        means = RNG.normal(3.28, sigma / math.sqrt(8), sims)
        shares.append(np.mean((3.28 - means) * math.sqrt(8) >= track3.MARGIN))
    expected = stats.norm.sf(track3.MARGIN / track3.SIGMA)
    assert abs(shares[0] - expected) < 4 * math.sqrt(expected / sims)
    assert shares[1] > 0.04
    assert not track3.rule([3.2786] * 8).passed
    assert track3.rule([3.28 - 0.004 / math.sqrt(8)] * 8).passed


def test_the_first_step_that_passes_is_common_to_all_runs() -> None:
    steps = [100, 110, 120]
    assert track3.first_passing_step([(steps, [3.29, 3.275, 3.27]), ([100, 120], [3.29, 3.27])]) == 120
    assert track3.first_passing_step([(steps, [3.29, 3.275, 3.27])]) == 110
    assert math.isnan(track3.first_passing_step([(steps, [3.29, 3.281, 3.28])]))


TIMES = [[10.0, 30.0, math.inf], [20.0, 10.0, 50.0], [35.0, 45.0, 100.0]]


def test_ratios_profiles_and_scores_by_hand() -> None:
    ratios = profiles.performance_ratios(TIMES)
    assert ratios.tolist() == [[1, 3, math.inf], [2, 1, 1], [3.5, 4.5, 2]]
    assert profiles.profile(ratios, [1, 2, 4]).tolist() == [
        [1 / 3, 1 / 3, 2 / 3],
        [2 / 3, 1, 1],
        [0, 1 / 3, 2 / 3],
    ]
    assert profiles.scores(ratios) == pytest.approx(
        [(1 + 1 / 3 + 0) / 3, (2 / 3 + 1 + 1) / 3, (1 / 6 + 0 + 2 / 3) / 3]
    )


def test_the_score_is_the_integral_of_the_profile() -> None:
    """AlgoPerf integrates the profile numerically; the score here is exact."""
    ratios = profiles.performance_ratios(RNG.uniform(1, 9, (5, 7)))
    taus = np.linspace(1, 4, 20_001)
    oracle = np.trapezoid(profiles.profile(ratios, taus), taus) / 3
    assert profiles.scores(ratios) == pytest.approx(oracle, abs=1e-3)


def test_a_workload_that_a_submission_lacks_counts_as_not_reached() -> None:
    assert profiles.performance_ratios([[1.0, math.nan], [2.0, 3.0]]).tolist() == [[1, math.inf], [2, 1]]
    assert np.isinf(profiles.performance_ratios([[math.inf], [math.inf]])).all()


def test_sets_are_workloads(tmp_path: Path) -> None:
    """Two sets of tables of other trainers: the one that falls faster has the score 1."""
    for workload in ("small", "large"):
        lines = ["optimizer,seed,step,val/loss,comparison_key"]
        for optimizer, rate in (("fast", 2.0), ("slow", 1.0)):
            lines += [
                f"{optimizer},{seed},{step},{5 - rate * step / 100 + seed / 1000},{workload}"
                for seed in (0, 1)
                for step in (0, 50, 100)
            ]
        (tmp_path / f"{workload}.csv").write_text("\n".join(lines))
    found = document.to_json(document.judge_folder(tmp_path))["comparison"]["profiles"]
    by_name = {row["name"]: row for row in found["submissions"]}
    assert by_name["fast"]["score"] == 1
    assert by_name["slow"]["ratios"] == pytest.approx([2, 2], rel=1e-3)
    assert by_name["slow"]["score"] == pytest.approx(2 / 3, abs=1e-3)
    write_arm(tmp_path / "logs" / "a", [3.0])
    one = document.judge_folder(tmp_path / "logs", log_format="track3")
    assert document.to_json(one)["comparison"]["profiles"] is None
