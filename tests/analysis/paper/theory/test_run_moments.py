"""Moments of run folders: figures of parquet files, and the parts of an error against constructed spectra."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from analysis.paper.theory import findings, run_moments
from analysis.paper.theory.arms import TheoryArm, arms_of
from analysis.paper.theory.one_step import StepRow
from analysis.paper.theory.paired_runs import paired_rows, pairs
from analysis.paper.theory.polar_bound import MUON, band, matrix
from analysis.paper.theory.run_moments import RealMoment, error_row
from analysis.runs import loading
from analysis.runs.run import LoadedRun
from tests.analysis.synthetic import Recipe, write

EXACT: dict[str, Any] = {"orthogonalizer": "auto", "orthogonalizer_steps": 5, "nesterov": False}
OTHER = EXACT | {"orthogonalizer": "newton_schulz"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[LoadedRun]:
    """Three seeds of both factors, whose losses differ by 0.05; one run with another rate, and one without a pair."""
    root = tmp_path_factory.mktemp("runs")
    for seed in range(3):
        write(root, Recipe("sumo", seed=seed, end=3.4, noise=0.0, options=EXACT))
        write(root, Recipe("sumo_ns5", seed=seed, end=3.45, noise=0.0, options=OTHER))
    write(root, Recipe("sumo_ns5", seed=2, options=OTHER, lr=2e-3), "twice-the-rate")
    write(root, Recipe("sumo_ns5", seed=3, options=OTHER))
    return loading.load(root)


ARM = TheoryArm("tiny, 100 steps of 8×64", "sumo", "lr 0.001")


def moment(seed: int, values: np.ndarray, columns: int = 24, arm: TheoryArm = ARM) -> RealMoment:
    a, _ = matrix(values, columns)
    return RealMoment(arm, seed, 40, "layer", torch.from_numpy(a).float())


def test_condition_numbers_are_quantiles_over_matrices_and_seeds(runs: list[LoadedRun]) -> None:
    rows = run_moments.condition_rows(runs, arms_of(runs))
    row = next(row for row in rows if (row.arm.optimizer, row.step) == ("sumo", 200))
    own = [run.moments[run.moments["step"] == 200] for run in runs if run.optimizer == "sumo"]
    kappa = np.concatenate([frame["condition_number"] for frame in own])
    stable = np.concatenate([frame["stable_rank"] for frame in own])
    assert (row.runs, row.matrices) == (3, len(kappa))
    assert row.condition["median"] == pytest.approx(np.median(kappa))
    assert row.condition["max"] == pytest.approx(kappa.max())
    assert row.above == pytest.approx((kappa > 10).mean())
    assert row.residual_share == pytest.approx(np.median(1 - 1 / stable))


def test_an_error_inside_the_band() -> None:
    row = error_row(moment(0, np.geomspace(1.0, 1 / 50, 8)))
    assert row is not None
    p = MUON.polynomial(MUON.scaled(np.geomspace(1.0, 1 / 50, 8)), 5)
    assert row.condition == pytest.approx(50.0, rel=1e-5)
    assert row.computed == pytest.approx(np.sqrt(np.mean((1 - p) ** 2)), rel=1e-5)
    assert row.measured == pytest.approx(row.computed, abs=1e-5)
    assert (row.small, row.small_energy) == (0.0, 0.0)
    assert row.lifted == row.computed
    assert row.length == pytest.approx((1 - p.mean()) ** 2 / np.mean((1 - p) ** 2), rel=1e-4)


def test_an_error_that_does_come_from_small_singular_values() -> None:
    """The control: at κ = 1e4 half of the directions are below the band, and lifting them repairs most of it."""
    values = np.array([1.0] * 4 + [1e-4] * 4)
    row = error_row(moment(0, values))
    assert row is not None
    assert row.small == 0.5
    assert row.small_energy > 0.9
    assert row.lifted < 0.5 * row.computed
    assert row.measured == pytest.approx(row.computed, abs=1e-3)
    # The first four directions have s = 1/2.
    inside = float(MUON.polynomial(np.array([0.5]), 5)[0])
    outside = float(MUON.polynomial(np.array([0.5e-4]), 5)[0])
    assert row.computed == pytest.approx(np.sqrt(((1 - inside) ** 2 + (1 - outside) ** 2) / 2), rel=1e-3)


def test_lifting_reaches_the_start_of_the_band_and_nothing_else() -> None:
    values = np.array([1.0, 0.5, 1e-5])
    result = run_moments.lifted(values, band())
    np.testing.assert_array_equal(result[:2], values[:2])
    assert result[2] / np.linalg.norm(result) == pytest.approx(band().start, rel=1e-9)


def test_a_moment_that_is_zero_has_no_error() -> None:
    assert error_row(RealMoment(ARM, 0, 1, "layer", torch.zeros(3, 4))) is None


def test_pairs_differ_in_the_factor_and_in_a_rate_that_is_stated(runs: list[LoadedRun]) -> None:
    found = pairs(runs)
    assert [pair.exact.optimizer for pair in found] == ["sumo"] * 4
    assert [pair.newton_schulz.optimizer for pair in found] == ["sumo_ns5"] * 4
    assert all(pair.exact.seed == pair.newton_schulz.seed for pair in found)
    last, other = (row for row in paired_rows(found, arms_of(runs)) if row.is_last)
    assert (last.exact_lr, last.newton_schulz_lr, last.difference.n) == (1e-3, 1e-3, 3)
    assert (other.exact_lr, other.newton_schulz_lr, other.difference.n) == (1e-3, 2e-3, 1)
    equal = [pair for pair in found if pair.newton_schulz.optimizer_config["lr"] == 1e-3]
    differences = [pair.newton_schulz.final_loss - pair.exact.final_loss for pair in equal]
    assert last.difference.mean == pytest.approx(np.mean(differences))
    # The synthetic curves tend to ends that are 0.05 apart, as exp(-6 t/T), without noise.
    assert last.difference.mean == pytest.approx(0.05 * (1 - np.exp(-6)), abs=1e-9)
    assert last.exact == pytest.approx(np.mean([pair.exact.final_loss for pair in equal]))


def test_a_look_ahead_is_not_what_is_stored(runs: list[LoadedRun], tmp_path: Path) -> None:
    write(tmp_path, Recipe("muon", options=OTHER | {"nesterov": True}))
    (muon,) = loading.load(tmp_path)
    assert not run_moments.orthogonalizes_its_moment(muon)
    assert run_moments.orthogonalizes_its_moment(runs[0])


def test_summaries_take_runs_as_replicates() -> None:
    errors = []
    for seed in range(3):
        for kappa in (5.0, 20.0, 60.0):
            row = error_row(moment(seed, np.geomspace(1.0, 1 / kappa, 8)))
            assert row is not None
            errors.append(row)
    (summary,) = findings.error_summaries(errors)
    assert (summary.runs, summary.moments) == (3, 9)
    assert summary.rank_correlation.n == summary.small_energy_runs.n == 3
    assert summary.inside == 1.0
    assert summary.measured == pytest.approx(np.median([row.measured for row in errors]))
    assert next(iter(findings.spectra(errors).values()))[0] == 1.0


def test_shares_are_of_the_summed_error() -> None:
    """80 moments inside the band and 20 below it: the mean share per moment says 20 %, the error says most."""
    inside = error_row(moment(0, np.geomspace(1.0, 1 / 20, 8)))
    below = error_row(moment(0, np.array([1.0] + [1e-5] * 7)))
    assert inside is not None
    assert below is not None
    (summary,) = findings.error_summaries([inside] * 80 + [below] * 20)
    # ‖O_NS - UVᵀ‖² of both, by hand from the measured errors.
    small = 20 * below.measured**2 * 8 * below.small_energy
    assert summary.small_energy == pytest.approx(small / (small + 8 * (80 * inside.measured**2)), rel=0.02)
    assert summary.small_energy > 0.7
    assert np.mean([inside.small_energy] * 80 + [below.small_energy] * 20) < 0.21
    lemmas = findings.compute([])
    lemmas.error_summaries = [summary]
    assert "mainly from small singular values" in findings.headline(lemmas)
    # Optimizers and scales are not pooled.
    other = findings.error_summaries([inside._replace(arm=ARM._replace(optimizer="sumo_ns5"))] * 80)
    lemmas.error_summaries = [summary, *other]
    assert "in some settings and not in others" in findings.headline(lemmas)


def test_two_rates_of_one_seed_are_two_arms(tmp_path: Path) -> None:
    for lr in (1e-3, 2e-3):
        write(tmp_path, Recipe("sumo", options=EXACT, lr=lr), f"rate-{lr}")
    write(tmp_path, Recipe("sumo", seed=1, options=EXACT, lr=1e-3))
    write(tmp_path, Recipe("sumo", options=EXACT | {"rank": 8}, lr=1e-3), "rank-8")
    found = loading.load(tmp_path)
    arms = arms_of(found)
    assert sorted({arm.setting for arm in arms.values()}) == [
        "lr 0.001, rank 8",
        "lr 0.001, rank None",
        "lr 0.002, rank None",
    ]
    rows = run_moments.condition_rows(found, arms)
    assert {row.arm.setting: row.runs for row in rows if row.step == 200} == {
        "lr 0.001, rank 8": 1,
        "lr 0.001, rank None": 2,
        "lr 0.002, rank None": 1,
    }
    # Summaries of errors and steps keep them apart, too.
    errors = [
        error_row(moment(0, np.geomspace(1.0, 0.1, 8), arm=arm)) for arm in dict.fromkeys(arms.values())
    ]
    assert len(findings.error_summaries([row for row in errors if row is not None])) == 3
    after = {name: {"batch": 1.0} for name in ("exact", "newton_schulz", "shortened")}
    steps = [StepRow(arm, 0, 40, 0, {"batch": 2.0}, after, 0.9) for arm in dict.fromkeys(arms.values())]
    assert [row.difference.n for row in findings.step_summaries(steps)] == [1, 1, 1]
