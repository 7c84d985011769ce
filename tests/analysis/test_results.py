"""docs/RESULTS.md: the page follows from its summaries, and its estimators find the truth of synthetic data."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from analysis.comparison import seed_noise, statistics, track3
from analysis.results import __main__ as results
from analysis.results import prediction, track3_section, track3_summary
from tests.analysis.runs.logs.synthetic import track3_log, write_arm

DOCS = Path(__file__).resolve().parents[2] / "docs"
RNG = np.random.default_rng(11)


def test_the_page_is_what_its_summaries_give() -> None:
    assert (DOCS / results.PAGE).read_text(encoding="utf-8") == results.render(DOCS / results.FOLDER)


def test_every_number_of_a_summary_follows_from_the_logs(tmp_path: Path) -> None:
    write_arm(tmp_path / "logs" / "a", [3.20, 3.24])
    write_arm(tmp_path / "logs" / "b", [3.30])
    (tmp_path / "logs" / "a" / "2.txt").write_text((tmp_path / "logs" / "a" / "0.txt").read_text())
    (tmp_path / "logs" / "b" / "1.txt").write_text(track3_log(3.31, seconds=2) + track3_log(3.32, seconds=3))
    assert results.main(["--track3", str(tmp_path / "logs"), "--docs", str(tmp_path)]) == 0
    summary = json.loads((tmp_path / "results" / "track3.json").read_text())
    assert (summary["runs"], summary["copies"], len(summary["files"])) == (6, 1, 5)
    first, second = summary["arms"]
    assert [run["final"] for run in first["runs"]] == [3.20, 3.24]
    assert [run["final"] for run in second["runs"]] == [3.30, 3.31, 3.32]
    # The losses fall by a third of 10.8 − 3.2 every 100 steps: at 75 of 300 steps three quarters of the first third.
    assert first["runs"][0]["at_share"] == pytest.approx(
        [10.8 - 7.6 / 4, 10.8 - 7.6 / 2, 10.8 - 0.75 * 7.6], abs=1e-4
    )
    assert first["runs"][0]["reaches_target"] == pytest.approx(300 * (10.8 - 3.28) / 7.6, abs=0.1)
    assert second["runs"][0]["reaches_target"] is None
    page = (tmp_path / results.PAGE).read_text()
    assert "| a | 2 | 300 | 3.2200 |" in page
    assert "`several_runs`: b/1.txt holds 2 runs" in page
    assert page == results.render(tmp_path / "results")


def test_without_logs_nothing_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert results.main(["--track3", str(tmp_path / "none"), "--docs", str(tmp_path)]) == 2
    assert "is not a folder" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_the_interval_of_a_rank_correlation_covers_the_truth() -> None:
    """Bivariate normal items have Spearman's 6/π·asin(ρ/2); an unpaired control is not covered."""
    rho, covered, misled, sims = 0.7, 0, 0, 60
    truth = 6 / math.pi * math.asin(rho / 2)
    for _ in range(sims):
        x, noise = RNG.normal(size=(2, 40))
        y = rho * x + math.sqrt(1 - rho**2) * noise
        found = prediction.rank_correlation(x, y, resamples=400)
        assert found.value == pytest.approx(stats.spearmanr(x, y)[0])
        covered += found.low <= truth <= found.high
        shuffled = prediction.rank_correlation(x, RNG.permutation(y), resamples=400)
        misled += shuffled.low <= truth <= shuffled.high
    assert covered >= 0.95 * sims - 4 * math.sqrt(0.05 * 0.95 * sims)
    assert misled < 0.1 * sims


def test_items_that_lack_a_figure_are_left_out() -> None:
    x = [1.0, 2.0, 3.0, 4.0, 5.0, math.nan]
    assert prediction.rank_correlation(x, [2.0, 1.0, 3.0, 5.0, 4.0, 9.0], resamples=100).n == 5
    assert math.isnan(prediction.rank_correlation(x[:3], x[:3]).value)


def test_the_correlation_within_arms_ignores_what_arms_have_in_common() -> None:
    """Arms that differ much, runs that do not predict: 0 within, near 1 over all runs (the control)."""
    arms, covered = [], 0
    for mean in np.linspace(0, 50, 10):
        arms.append((mean + RNG.normal(size=12), mean + RNG.normal(size=12)))
    found = prediction.within_arms(arms)
    assert found.n == 110
    assert abs(found.value) < 4 / math.sqrt(110)
    first, second = (np.concatenate(side) for side in zip(*arms, strict=True))
    assert np.corrcoef(first, second)[0, 1] > 0.9
    for _ in range(300):
        x = RNG.normal(size=(8, 5))
        y = 0.5 * x + math.sqrt(0.75) * RNG.normal(size=(8, 5))
        found = prediction.within_arms(list(zip(x, y, strict=True)))
        covered += found.low <= 0.5 <= found.high
    assert abs(covered / 300 - 0.95) < 4 * math.sqrt(0.05 * 0.95 / 300)


@pytest.mark.parametrize("difference", [0.0005, 0.001, 0.002])
def test_the_runs_for_the_rule_pass_it_as_often_as_stated(difference: float) -> None:
    sd = 0.0011
    n = track3_section.runs_for_the_rule(sd, difference)

    def power(n: int) -> float:
        return float(stats.norm.cdf((difference * math.sqrt(n) - track3.MARGIN) / sd))

    assert power(n) >= statistics.POWER > power(n - 1)


def test_the_shipped_summary_holds_what_it_states() -> None:
    summary: dict[str, Any] = json.loads((DOCS / results.FOLDER / "track3.json").read_text(encoding="utf-8"))
    assert summary["schema_version"] == track3_summary.SCHEMA_VERSION
    assert sum(len(arm["runs"]) for arm in summary["arms"]) == summary["runs"] - summary["copies"]
    assert all(len(digest) == 64 for digest in summary["files"].values())
    muonh = next(arm for arm in summary["arms"] if arm["arm"] == "20260430_muonh")
    finals = [run["final"] for run in muonh["runs"]]
    assert (len(finals), round(float(np.mean(finals)), 4)) == (10, 3.2782), "as published"
    pooled = seed_noise.pooled([[run["final"] for run in arm["runs"]] for arm in summary["arms"]])
    assert 0.001 < pooled.low < pooled.sd < pooled.high < 0.0013
