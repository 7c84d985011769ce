"""Comparison at equal validation loss: interpolation, the common range, paired tests, the dose."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.multitest import multipletests

from analysis.memorization import equal_loss

ARMS = {
    "adamw": 0.0,
    "muon": 1.0,
    "galore": 0.0,
    "sumo (rank=4)": 0.3,
    "sumo (rank=16)": 0.0,
    "sumo (rank=64)": 0.5,
}


def result(
    optimizer: str, seed: int, step: int, loss: float, bits: float, rank: int | None = None
) -> dict[str, Any]:
    canaries = [{"name": n, "copies": 1, "exposure": bits + d} for n, d in (("A", -0.5), ("B", 0.5))]
    return {
        "optimizer": optimizer,
        "preset": optimizer.partition(" (")[0],
        "seed": seed,
        "step": step,
        "rank": rank,
        "val_loss": loss,
        "exposure": [{"copies": 0, "mean": 1.4}, {"copies": 1, "mean": bits}],
        "canaries": canaries,
        "membership": {"auc": 0.5, "min_k": {"auc": 0.5}},
        "extraction": {"difference": {"tokens_right": 0.0}},
        "robustness": {"head_margin": {"median": bits / 10}, "embedding_radius": {"median": bits / 20}},
    }


def line_of(optimizer: str, seed: int, slope: float, rank: int | None = None) -> list[dict[str, Any]]:
    """Checkpoints with exposure = slope · (6 − loss), at losses that differ between optimizers."""
    shift = 0.1 * len(optimizer) + 0.01 * seed
    losses = [6.0 - shift, 5.0 - shift, 4.5 - shift, 4.0 - shift]
    return [result(optimizer, seed, i, loss, slope * (6 - loss), rank) for i, loss in enumerate(losses)]


def entry(found: list[dict[str, Any]], measure: str = "exposure_1") -> dict[str, Any]:
    return next(e for e in found if e["measure"] == measure)


def test_a_curve_is_linear_between_checkpoints_and_ends_at_the_lowest_loss() -> None:
    rows = [
        result("a", 0, s, loss, bits)
        for s, loss, bits in ((1, 5.0, 1), (2, 4.0, 3), (3, 4.2, 9), (4, 3.9, 4))
    ]
    (curve,) = equal_loss.run_curves(rows)
    (measure, *_) = equal_loss.measures(rows)
    assert curve.losses.tolist() == [5.0, 4.0, 3.9]
    assert curve.at(4.25, measure.value) == pytest.approx(2.5)
    assert curve.at(3.9, measure.value) == 4.0
    assert np.isnan([curve.at(loss, measure.value) for loss in (3.8, 5.1)]).all()


def test_optimizers_on_one_line_do_not_differ_at_equal_loss_though_they_do_at_equal_steps() -> None:
    rows = [r for name in ("a", "muon") for seed in range(4) for r in line_of(name, seed, 2.0)]
    found = entry(equal_loss.compare(rows, None))
    assert found["val_loss"] == pytest.approx(4.0 - 0.1)
    (pair,) = found["pairs"]
    assert pair["difference"] == pytest.approx(0, abs=1e-12)
    assert pair["p"] in (None, 1.0)
    last = {
        name: [r["exposure"][1]["mean"] for r in rows if r["optimizer"] == name and r["step"] == 3]
        for name in ("a", "muon")
    }
    assert np.mean(last["muon"]) > np.mean(last["a"]) + 0.5


def test_a_difference_at_equal_loss_has_the_p_value_of_a_paired_t_test() -> None:
    slopes = {"adamw": [2.0, 2.2, 1.9, 2.1, 2.05], "b": [3.0, 3.3, 2.8, 3.2, 2.9]}
    rows = [
        r for name in slopes for seed, slope in enumerate(slopes[name]) for r in line_of(name, seed, slope)
    ]
    found = equal_loss.compare(rows, [4.5, 4.2, 9.0])
    assert {e["val_loss"] for e in found} == {4.5, 4.2}
    at = entry(found)
    values = {name: np.array(slopes[name]) * 1.5 for name in slopes}
    arms = {arm["optimizer"]: arm["mean"] for arm in at["optimizers"]}
    assert arms == pytest.approx({name: v.mean() for name, v in values.items()})
    (pair,) = at["pairs"]
    assert pair["p"] == pytest.approx(stats.ttest_rel(values["adamw"], values["b"]).pvalue)
    # Two levels × one primary measure × one pair with AdamW; the slopes have one p at both levels.
    planned = [p for e in found for p in e["pairs"] if p["planned"]]
    assert [p["p_holm"] for p in planned] == pytest.approx([2 * pair["p"]] * 2)
    assert {p["p_holm"] for e in found for p in e["pairs"] if not p["planned"]} == {None}


def of_canaries(optimizer: str, seed: int, exposures: np.ndarray) -> list[dict[str, Any]]:
    rows = [result(optimizer, seed, step, loss, exposures.mean()) for step, loss in ((1, 5.0), (2, 4.0))]
    for row in rows:
        row["canaries"] = [{"name": str(n), "copies": 1, "exposure": e} for n, e in enumerate(exposures)]
    return rows


def test_seeds_and_canaries_are_both_samples() -> None:
    """Seeds that agree on canaries which do not: a paired t-test over seeds alone would settle it."""
    rng = np.random.default_rng(1)
    of_canary, noise = rng.normal(0.3, 1.0, 8), rng.normal(0.0, 0.02, (4, 8))
    rows = [r for seed in range(4) for r in of_canaries("adamw", seed, np.full(8, 3.0))]
    rows += [r for seed in range(4) for r in of_canaries("muon", seed, 3.0 + of_canary + noise[seed])]
    (pair,) = entry(equal_loss.compare(rows, None))["pairs"]
    over_seeds: Any = stats.ttest_1samp(noise.mean(1) + of_canary.mean(), 0.0)
    assert over_seeds.pvalue < 0.001
    # Nearly all of the variance is between canaries: their t-test.
    over_canaries = stats.ttest_1samp(-of_canary - noise.mean(0), 0.0)
    assert pair["p"] == pytest.approx(over_canaries[1], rel=0.01)
    low, high = over_canaries.confidence_interval()
    assert [pair["low"], pair["high"]] == pytest.approx([low, high], rel=0.01)
    # A single canary shows nothing of others.
    for row in rows:
        row["canaries"] = row["canaries"][:1]
    (pair,) = entry(equal_loss.compare(rows, None))["pairs"]
    assert (pair["p"], pair["low"]) == (None, None)


def test_intervals_of_means_end_where_the_measure_does() -> None:
    rows = [r for seed, bits in enumerate((4.0, 7.0)) for r in of_canaries("adamw", seed, np.full(2, bits))]
    (arm,) = entry(equal_loss.compare(rows, None))["optimizers"]
    assert (arm["mean"], arm["low"], arm["high"]) == (5.5, 0.0, 7.0)
    assert stats.t.interval(0.95, 1, 5.5, 1.5)[1] > 7.0


def test_runs_that_never_had_the_same_loss_are_not_compared() -> None:
    rows = [result("a", 0, s, loss, 1) for s, loss in ((1, 6.0), (2, 5.0))]
    rows += [result("b", 0, s, loss, 1) for s, loss in ((1, 4.0), (2, 3.0))]
    assert equal_loss.compare(rows, None) == []


def test_the_dose_is_the_slope_per_doubling_of_the_rank() -> None:
    rows = []
    for rank in (4, 8, 16):
        for seed in range(3):
            bits = 1.0 + 0.25 * np.log2(rank) + 0.01 * seed
            label = f"sumo (rank={rank})"
            rows += [result(label, seed, s, loss, bits, rank) for s, loss in ((1, 6.0), (2, 5.0))]
    found = equal_loss.dose(rows, 5.5)[0]
    assert (found["optimizer"], found["ranks"], found["seeds"]) == ("sumo", [4, 8, 16], 3)
    assert found["per_doubling"] == pytest.approx(0.25)


def test_holm_counts_the_contrasts_with_adamw_in_exposure_alone() -> None:
    rng = np.random.default_rng(0)
    slopes = {name: 2.0 + shift + 0.1 * rng.normal(size=5) for name, shift in ARMS.items()}
    rows = [
        r for name in slopes for seed, slope in enumerate(slopes[name]) for r in line_of(name, seed, slope)
    ]
    found = equal_loss.compare(rows, [4.5])
    pairs = [(e["measure"], p) for e in found for p in e["pairs"]]
    planned = [p for measure, p in pairs if p["planned"]]
    assert len(planned) == 5
    assert all((p["a"] == "adamw") != (p["b"] == "adamw") for p in planned)
    expected = np.asarray(multipletests([p["p"] for p in planned], method="holm")[1])
    assert [p["p_holm"] for p in planned] == pytest.approx(expected)
    assert expected.min() < 0.05
    # Control: over all pairs and measures, five seeds show nothing of the same data.
    every_p = [1.0 if p["p"] is None else p["p"] for _, p in pairs]
    everything = np.asarray(multipletests(every_p, method="holm")[1])
    assert everything.min() > expected.min()


def test_the_run_that_came_down_least_sets_the_level() -> None:
    rows = [r for name in ("adamw", "muon") for seed in range(3) for r in line_of(name, seed, 2.0)]
    curves = equal_loss.run_curves(rows)
    worst = equal_loss.limiting(curves)
    reached = equal_loss.common_range(curves)
    assert reached is not None
    assert (worst.optimizer, worst.seed, worst.losses[-1]) == ("muon", 0, reached[0])


def test_the_level_of_chance_is_a_row_and_no_hypothesis() -> None:
    rows = [r for name in ("adamw", "muon") for seed in range(3) for r in line_of(name, seed, 2.0)]
    for row in rows:
        row["membership"] = {**row["membership"], "chance": {"auc": 0.45}}
    found = entry(equal_loss.compare(rows, None), "chance_auc")
    assert [arm["mean"] for arm in found["optimizers"]] == pytest.approx([0.45, 0.45])
    assert found["pairs"] == []
