"""docs/RESULTS.md: the page follows from its summaries, and its estimators find the truth of synthetic data."""

from __future__ import annotations

import json
import math
import re
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
    write_arm(tmp_path / "logs" / "a", [3.20, 3.24], steps=(0, 80, 150, 225, 300))
    write_arm(tmp_path / "logs" / "b", [3.30])
    (tmp_path / "logs" / "a" / "2.txt").write_text((tmp_path / "logs" / "a" / "0.txt").read_text())
    (tmp_path / "logs" / "b" / "1.txt").write_text(track3_log(3.31, seconds=2) + track3_log(3.32, seconds=3))
    assert results.main(["--track3", str(tmp_path / "logs"), "--docs", str(tmp_path)]) == 0
    summary = json.loads((tmp_path / "results" / "track3.json").read_text())
    assert (summary["runs"], summary["copies"], len(summary["files"])) == (6, 1, 5)
    first, second = summary["arms"]
    assert [run["final"] for run in first["runs"]] == [3.20, 3.24]
    assert [run["final"] for run in second["runs"]] == [3.30, 3.31, 3.32]
    # The losses fall by a quarter of 10.8 − 3.2 at each evaluation, and step 80 is the nearest one to 75.
    assert first["share_steps"] == [80, 150, 225]
    assert first["runs"][0]["at_share"] == pytest.approx([10.8 - 7.6 * i / 4 for i in (1, 2, 3)])
    assert second["share_steps"] == [None, None, None], "no evaluation of this arm is near"
    assert first["runs"][0]["reaches_target"] == pytest.approx(225 + 75 * (5.1 - 3.28) / 1.9, abs=0.1)
    assert second["runs"][0]["reaches_target"] is None
    page = (tmp_path / results.PAGE).read_text()
    assert "| a | 2 | 300 | 3.2200 |" in page
    assert "`several_runs`: b/1.txt holds 2 runs" in page
    assert page == results.render(tmp_path / "results")


def test_the_noise_during_a_run_is_that_of_single_evaluations(tmp_path: Path) -> None:
    """The evaluations have independent noise; the mean of the two around a part would vary 0.71 times as much."""
    folder = tmp_path / "logs" / "a"
    folder.mkdir(parents=True)
    steps, sims = (0, 240, 260, 490, 510, 740, 760, 1000), 150
    for run in range(sims):
        losses = 3.3 + 0.01 * RNG.normal(size=len(steps))
        rows = [
            f"step:{step}/1000 val_loss:{loss:.5f} train_time:{run + step}s"
            for step, loss in zip(steps, losses, strict=True)
        ]
        (folder / f"{run}.txt").write_text("\n".join(rows) + "\n")
    (arm,) = track3_summary.summarize(tmp_path / "logs")["arms"]
    assert arm["share_steps"] == [240, 490, 740]
    for i in range(3):
        found = seed_noise.pooled([[run["at_share"][i] for run in arm["runs"]]])
        assert found.sd == pytest.approx(0.01, rel=4 / math.sqrt(2 * sims))
        assert found.low > 0.01 / math.sqrt(2), "the control: interpolated losses"


def test_a_run_that_diverged_has_no_final_loss_and_fails_the_rule(tmp_path: Path) -> None:
    write_arm(tmp_path / "logs" / "a", [3.20, 3.21])
    write_arm(tmp_path / "logs" / "b", [3.20, 3.21])
    text = track3_log(3.22, seconds=2)
    (tmp_path / "logs" / "a" / "2.txt").write_text(text.replace("val_loss:3.22000", "val_loss:nan"))
    (tmp_path / "logs" / "a" / "3.txt").write_text("step:0/300 val_loss:nan train_time:1s\n")
    assert results.main(["--track3", str(tmp_path / "logs"), "--docs", str(tmp_path)]) == 0
    summary = json.loads((tmp_path / "results" / "track3.json").read_text())
    by_name = {arm["arm"]: arm for arm in summary["arms"]}
    diverged = [arm for name, arm in by_name.items() if name.startswith("a")]
    assert sum(arm["diverged"] for arm in diverged) == 2
    assert sorted((run["final"] or 0) for arm in diverged for run in arm["runs"]) == [0, 0, 3.20, 3.21]
    page = (tmp_path / results.PAGE).read_text()
    assert "2 of them diverged and have no final loss" in page
    assert "(fails, 2 diverged) | – |" in page
    (control,) = (line for line in page.splitlines() if line.startswith("| b |"))
    assert "fails" not in control


def test_the_page_shows_how_runs_predict_their_end_and_not_how_settings_do() -> None:
    """Runs of one setting have a correlation of 0.6. An arm that mixes settings hides it: not where it is left out."""
    rho, arms = 0.6, []
    for index in range(30):
        x, noise = RNG.normal(size=(2, 12))
        sides = (x, rho * x + math.sqrt(1 - rho**2) * noise)
        if index == 0:
            settings = np.linspace(-20, 20, 12)
            sides = (x - settings, noise + settings)
        arms.append(
            {
                "arm": "mixed" if index == 0 else f"arm{index}",
                "last_step": 100,
                "first_passing_step": None,
                "diverged": 0,
                "runs": [
                    {"final": 3.3 + b / 1000, "at_share": [4 + a / 1000], "at_step": [None], "reaches_target": None}
                    for a, b in zip(*sides, strict=True)
                ],
            }
        )  # fmt: skip
    page = track3_section.render(
        {"source": "", "model": "", "runs": 360, "copies": 0, "folders": 30, "files": {}, "findings": [],
         "remarks": [], "shares": [0.5], "steps": [750], "arms": arms}
    )  # fmt: skip
    (row,) = (line for line in page.splitlines() if line.startswith("| loss at 50% |"))
    alike, every = re.findall(r"\| (−?[\d.]+) \((−?[\d.]+) to (−?[\d.]+);", row)
    _, low, high = (float(figure.replace("−", "-")) for figure in alike)
    assert low <= rho <= high
    assert float(every[0].replace("−", "-")) < 0, "the control: with the mixed arm"
    assert "mixed (" in page, "it is named"


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
