"""The estimators of claims find the truth of synthetic runs, cover it as often as they say, and leave a null open."""

from __future__ import annotations

import math

import numpy as np
import pytest

from analysis.results import claims
from analysis.results.claims import Estimate, Outcome

STEPS = np.arange(10, 161, 10.0)
RNG = np.random.default_rng(24)


def curves(speed: float, shifts: np.ndarray) -> dict[int, claims.Losses]:
    """Runs whose loss is a function of speed × step, so that ``speed`` is exactly how many times faster they are."""
    return {
        seed: (STEPS, 3 + shift + 4 * (1 + speed * STEPS / 40) ** -1.2) for seed, shift in enumerate(shifts)
    }


def test_the_ratio_of_steps_is_found_within_the_interpolation() -> None:
    """The chord of a convex loss is above it: with evaluations every 10 of 160 steps the ratio is low by under 1 %."""
    shifts = RNG.normal(0, 0.02, 6)
    found = claims.step_ratio(curves(1.6, shifts), curves(1.0, shifts))
    assert found.value == pytest.approx(1.6, rel=0.01)
    back = claims.step_ratio(curves(1.0, shifts), curves(1.6, shifts))
    assert back.value * found.value == pytest.approx(1, rel=1e-12), "exchanging the arms gives the reciprocal"


def test_a_faster_optimizer_is_supported_a_slower_one_not_and_a_null_is_open() -> None:
    outcomes = []
    for speed in (1.3, 1 / 1.3, 1.0):
        first, second = RNG.normal(0, 0.02, (2, 8)) + RNG.normal(0, 0.1, 8)
        outcomes.append(claims.step_ratio(curves(speed, first), curves(1.0, second)).outcome(1.0))
    assert outcomes == [Outcome.SUPPORTED, Outcome.NOT_SUPPORTED, Outcome.OPEN]


def test_the_interval_of_a_null_ratio_excludes_one_as_often_as_it_should() -> None:
    sims = 600
    wrong = 0
    for _ in range(sims):
        first, second = RNG.normal(0, 0.02, (2, 5)) + RNG.normal(0, 0.1, 5)
        wrong += claims.step_ratio(curves(1.0, first), curves(1.0, second)).outcome(1.0) is not Outcome.OPEN
    assert wrong / sims == pytest.approx(0.05, abs=4 * math.sqrt(0.05 * 0.95 / sims))


def test_a_difference_is_paired_by_seed_and_uses_common_seeds_only() -> None:
    shared = RNG.normal(0, 0.5, 9)
    first = {seed: 3.05 + value + RNG.normal(0, 0.005) for seed, value in enumerate(shared)}
    second = {seed: 3.00 + value + RNG.normal(0, 0.005) for seed, value in enumerate(shared)}
    del second[3]
    found = claims.difference(first, second)
    assert found.n == 8
    assert found.low <= 0.05 <= found.high
    assert found.outcome() is Outcome.SUPPORTED
    unpaired = claims.difference(first, {seed: value + RNG.normal(0, 0.7) for seed, value in second.items()})
    assert unpaired.outcome() is Outcome.OPEN, "the control: seeds that have nothing in common"


def test_equal_values_or_one_value_decide_nothing() -> None:
    for values in ([2.0, 2.0, 2.0], [1.0], []):
        assert claims.mean_of(values).outcome() is Outcome.OPEN
    assert claims.difference({1: 5.0}, {2: 1.0}).outcome() is Outcome.OPEN


def test_the_threshold_moves_the_outcome() -> None:
    found = Estimate(1.4, 1.3, 1.5, 5)
    assert [found.outcome(at) for at in (1.0, 1.4, 1.6)] == [
        Outcome.SUPPORTED,
        Outcome.OPEN,
        Outcome.NOT_SUPPORTED,
    ]


def test_spikes_are_counted_once_each_and_noise_is_none() -> None:
    losses = 3 + 5 * np.exp(-np.arange(200) / 30) + RNG.normal(0, 0.03, 200)
    assert claims.count_spikes(losses) == 0
    spiked = losses.copy()
    spiked[80:84] += 1.0
    spiked[150] = math.nan
    assert claims.count_spikes(spiked) == 2
    assert claims.count_spikes(losses[:10]) == 0
    wide = 3 + RNG.normal(0, 0.5, 200)
    wide[150] += 1.0
    assert claims.count_spikes(wide) == 0, "within the noise of this run"


def test_the_range_of_rates_is_that_of_the_lines_between_them() -> None:
    rates, losses = [1.0, 2, 4, 8, 16], [3.10, 3.01, 3.00, 3.04, math.inf]
    found = claims.rate_range(rates, losses)
    # Left: 0.02 above the best is at 2^(1 − 0.01/0.09); right: half the way from 4 to 8.
    assert found.width == pytest.approx((2 + 0.02 / 0.04) - (1 - 0.01 / 0.09))
    assert (found.inner, found.outer) == (1, 3)
    assert claims.rate_range(rates[::-1], losses[::-1]).width == pytest.approx(found.width)
    assert claims.rate_range([1, 2, 4], [3.0, 3.01, 3.2]).outer == math.inf, "nothing below 1 was tried"
    assert claims.rate_range([1, 2, 4], [math.inf, 3.0, math.inf]) == claims.RateRange(0, 0, 2)
    assert math.isnan(claims.rate_range([1, 2], [math.inf, math.nan]).width)


def parabola(width: float, shift: float = 0.0) -> tuple[list[float], np.ndarray]:
    """Trials around the best rate: ``width`` factors of two are within the tolerance."""
    octaves = np.arange(-4.0, 5)
    return list(2.0**octaves), 3 + claims.TOLERANCE * (2 * (octaves - shift) / width) ** 2


def test_a_wider_range_of_rates_is_found_and_an_equal_one_is_open() -> None:
    wide, narrow = parabola(5.0), parabola(1.0)
    assert claims.wider_range(wide, narrow, 0.001, resamples=200).outcome() is Outcome.SUPPORTED
    assert claims.wider_range(narrow, wide, 0.001, resamples=200).outcome() is Outcome.NOT_SUPPORTED
    assert claims.wider_range(wide, wide, 0.001, resamples=200).outcome() is Outcome.OPEN
    assert claims.wider_range(wide, narrow, math.nan).outcome() is Outcome.OPEN, "no seeds, no noise known"
    assert claims.wider_range(wide, narrow, 0.05, resamples=200).outcome() is Outcome.OPEN, (
        "the noise hides it"
    )


def test_equal_ranges_stay_open_wherever_their_best_rate_is_between_the_tried_ones() -> None:
    """The lines between rates a factor of two apart give other widths at other places: that decides nothing."""
    widths, wrong, sims = [], 0, 40
    for _ in range(sims):
        pair = [parabola(1.5, shift) for shift in RNG.uniform(-0.5, 0.5, 2)]
        first, second = ((rates, losses + RNG.normal(0, 0.002, 9)) for rates, losses in pair)
        found = claims.wider_range(first, second, 0.002, resamples=60)
        widths.append(found.value)
        wrong += found.outcome() is not Outcome.OPEN
    assert wrong <= 0.05 * sims
    assert max(widths) > 0.3, "the control: the value alone would decide"


def test_a_range_that_was_not_seen_to_end_decides_on_one_side_only() -> None:
    full = parabola(5.0)
    cut = (full[0][4:], full[1][4:])  # the best rate is the lowest that was tried
    assert claims.wider_range(cut, parabola(0.5), 0.0005, resamples=100).high == math.inf
    other = (full[0][2:], full[1][2:])
    found = claims.wider_range(other, parabola(0.5), 0.0005, resamples=100)
    assert (found.outcome(), found.high) == (Outcome.SUPPORTED, math.inf)
    assert claims.wider_range(parabola(0.5), other, 0.0005, resamples=100).outcome() is Outcome.NOT_SUPPORTED
    assert claims.wider_range(parabola(6.0), other, 0.0005, resamples=100).outcome() is Outcome.OPEN, (
        "it may go on"
    )
