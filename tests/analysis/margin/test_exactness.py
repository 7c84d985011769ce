"""Boundaries against brute force, the flow against a library's integrator, rates against known laws."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.integrate import solve_ivp
from scipy.optimize import minimize

from analysis.margin.flow import flow, separated_state
from analysis.margin.net import Nets, ToyProblem, ascent, exact_margin, is_dead, log_loss, outputs
from analysis.margin.points import Points, pair
from analysis.margin.trajectory import classify
from tests.analysis.margin.toys import I2, A, flowed, gap, ln10, net, random_net, states


def line(*x: float) -> Points:
    """Points on the line with the labels of a net that is to be chosen."""
    return Points(np.array(x)[:, None], np.ones(len(x)), "line")


@pytest.mark.parametrize("seed", range(40))
def test_margins_on_the_line_against_a_grid(seed: int) -> None:
    """The first grid point with y·f ≤ 0 lies within one grid step of the exact boundary."""
    toy = random_net(seed, k=2 + seed % 5)
    x = np.linspace(-6.0, 6.0, 240_001)
    f = outputs(toy, Points(x[:, None], np.ones(len(x)), "grid"))[:, 0]
    for start in (-1.3, 0.2, 1.0):
        value = float(outputs(toy, line(start))[0, 0])
        if value == 0.0:
            continue
        found = exact_margin(toy, Points(np.array([[start]]), np.sign([value]), "one"))
        crossed = np.abs(x - start)[np.sign(value) * f <= 0.0]
        nearest = crossed.min() if len(crossed) else np.inf
        if found.value < 4.5:
            assert found.value <= nearest + 1e-12
            assert found.value > nearest - 5.1e-5
            # At the boundary f is 0, and just before it is not.
            assert abs(float(outputs(toy, line(found.boundary))[0, 0])) < 1e-12
        else:
            assert nearest > 4.4


@pytest.mark.parametrize("seed", range(12))
def test_margins_in_space_against_an_optimizer(seed: int) -> None:
    """min ‖z - x‖² with y·f(z) ≤ 0 by a general solver from many starts is never smaller, and mostly equal."""
    toy = random_net(seed, 2, dim=3)
    rng = np.random.default_rng(seed)
    x = rng.normal(size=3)
    value = float(outputs(toy, Points(x[None], np.ones(1), "one"))[0, 0])
    if value == 0.0:
        pytest.skip("undecided start")
    y = math.copysign(1.0, value)
    found = exact_margin(toy, Points(x[None], np.array([y]), "one")).value

    def f(z: np.ndarray) -> float:
        return y * float(outputs(toy, Points(z[None], np.ones(1), "one"))[0, 0])

    best = np.inf
    for _ in range(30):
        start = x + rng.normal(size=3) * 2.0
        done = minimize(
            lambda z: float(((z - x) ** 2).sum()), start, constraints={"type": "ineq", "fun": lambda z: -f(z)}
        )
        if f(done.x) <= 1e-9:
            best = min(best, math.sqrt(done.fun))
    assert found <= best + 1e-6
    assert found == pytest.approx(best, rel=0.02) or not np.isfinite(best)


def test_a_zero_net_has_no_margin_and_a_one_sided_one_no_boundary() -> None:
    assert exact_margin(net([0.0, 0.0]), A.points).value == 0.0
    rising = Points(np.array([[1.0]]), np.ones(1), "one")
    assert exact_margin(net([1.0, 1.0], [5.0, -100.0], [1.0, 1.0]), rising).value == 6.0
    constant = exact_margin(net([0.0, 0.0], [1.0, -1.0]), rising)
    assert constant.value == np.inf


def test_flow_against_an_integrator_of_its_own_accord() -> None:
    """Plain gradient flow in τ by DOP853, from a start that switches neurons off."""
    start = net([1.0, -0.8], [0.4, 0.9])
    problem = A

    def field(_: float, theta: np.ndarray) -> np.ndarray:
        state = Nets(theta.reshape(2, 2, 1), start.output)
        return ascent(state, problem, scale_free=False).hidden.ravel()

    done = solve_ivp(field, (0.0, 1000.0), start.hidden.ravel(), method="DOP853", rtol=1e-11, atol=1e-12)
    (state,) = flow(start, problem, [math.log(1000.0)]).states
    # Where a switch is stepped over instead of landed on, the weights are 1e-3 off.
    assert state.hidden.ravel() == pytest.approx(done.y[:, -1], abs=1e-7)
    coarse = flow(start, problem, [math.log(1000.0)], step=0.5).states[0]
    assert np.abs(coarse.hidden.ravel() - done.y[:, -1]).max() > 1e-6


def test_the_logistic_loss_far_out() -> None:
    problem = ToyProblem(pair(1.0, 1.0), "logistic")
    for scale, tolerance in ((1.0, 1e-12), (30.0, 1e-9), (500.0, 1e-12)):
        state = net([scale, -scale])
        z = scale
        expected = math.log(math.log1p(math.exp(-z))) if z < 30 else -z + math.log1p(-math.exp(-z) / 2)
        assert float(log_loss(state, problem)[0]) == pytest.approx(expected, rel=tolerance)


SEEDS = {0: 0.012741, 3: 0.750307, 4: 0.000932, 13: 1.070001, 16: 0.000233, 18: 1.118173}


@pytest.fixture(scope="module")
def normal_starts() -> Nets:
    """w, b ~ N(0, 1) of 24 seeds, as one array of nets."""
    generators = [np.random.default_rng(seed) for seed in range(24)]
    starts = [net(rng.normal(0.0, 1.0, 2), rng.normal(0.0, 1.0, 2)) for rng in generators]
    return Nets(*(np.concatenate(parts, axis=-1) for parts in zip(*starts)))


def test_eighteen_of_24_starts_die(normal_starts: Nets) -> None:
    (_, end) = states(normal_starts, [0, 10_000])
    assert {int(seed) for seed in np.flatnonzero(~is_dead(end, A))} == set(SEEDS)


@pytest.fixture(scope="module")
def separated(normal_starts: Nets) -> dict[int, Nets]:
    """Seed → its net after 4e4 steps."""
    (_, end) = states(normal_starts.select(np.isin(np.arange(24), [*SEEDS])), [0, 40_000])
    return {seed: end.one(place) for place, seed in enumerate(SEEDS)}


@pytest.mark.parametrize("seed", SEEDS)
def test_constants_are_read_at_the_first_separated_state(
    seed: int, normal_starts: Nets, separated: dict[int, Nets]
) -> None:
    """C of the state after 4e4 steps is that of the slope."""
    end = separated[seed]
    assert not is_dead(end, A)[0]
    state = separated_state(end, A, math.log(400.0))
    assert state is not None
    assert state.constant == pytest.approx(SEEDS[seed], abs=1e-6)
    far = flow(end, A, [ln10(30), ln10(60)], math.log(400.0)).states
    slope = (1.0 / gap(far[1]) - 1.0 / gap(far[0])) / ln10(30)
    # 1e-4 of the gap of C = 2e-4 is the rounding of a margin near 1.
    by_slope = 1.0 / slope
    assert by_slope == pytest.approx(state.constant, rel=1e-6 if state.constant > 0.01 else 1e-4)
    if seed == 4:
        # At the start the formula is another one's: neurons that are on at both points shrink C first.
        hidden = normal_starts.one(seed).hidden[..., 0]
        assert 0.5 * abs(hidden[:, 0].sum() + hidden[1, 1] - hidden[0, 1]) == pytest.approx(0.9155, abs=1e-4)


def test_steps_to_a_small_gap_are_beyond_any_training_run() -> None:
    state = separated_state(net([2.0, -0.5]), A, -math.inf)
    assert state is not None
    assert state.margin(ln10(6)) == pytest.approx(1.0 - 0.05, abs=1e-3)
    assert state.margin(ln10(32)) == pytest.approx(1.0 - 0.01, abs=1e-4)


def test_rates_of_known_laws() -> None:
    log_t = np.linspace(0.0, ln10(8), 161)
    later = np.maximum(log_t, 1e-3)
    laws = {
        "log": 0.7 / (log_t + 2.0),
        "power": 3.0 * np.exp(-log_t),
        "zero": np.full_like(log_t, 1e-14),
    }
    for name, values in laws.items():
        assert classify(log_t, values, ln10(2)).rate_class == name
    assert classify(log_t, laws["log"], ln10(2)).constant == pytest.approx(0.7, rel=1e-9)
    assert classify(log_t, laws["power"], ln10(2)).exponent == pytest.approx(1.0, abs=1e-9)
    # Near misses: another exponent of t, of ln t, and too short a window.
    for values in (np.exp(-0.5 * log_t), 1.0 / np.sqrt(later), 1.0 / later**2):
        rate = classify(log_t, values, ln10(2))
        assert (rate.rate_class, rate.constant) == ("undetermined", None)
    short = classify(log_t, laws["log"], ln10(6.5))
    assert (short.rate_class, short.constant) == ("undetermined", pytest.approx(0.7, rel=1e-9))
    assert "2 are needed" in short.why
    assert classify(log_t, laws["log"], ln10(7.5)).constant is None


def test_nothing_past_stagnation_is_fitted() -> None:
    """A gap that freezes looks undetermined or wrong; before the flag it is what it was."""
    log_t = np.linspace(0.0, ln10(10), 201)
    values = 0.7 / (log_t + 2.0)
    values[log_t > ln10(6)] *= 0.5
    assert classify(log_t, values, ln10(2)).rate_class == "undetermined"
    rate = classify(log_t, values, ln10(2), stop=ln10(6))
    assert (rate.rate_class, rate.constant) == ("log", pytest.approx(0.7, rel=1e-9))
    assert rate.window is not None
    assert rate.window[1] < ln10(6)
    assert classify(log_t, values, ln10(2), stop=ln10(2.5)).constant is None


def test_margins_fall_before_they_rise_from_the_optimum() -> None:
    early, peak, late = (gap(state) for state in flowed(net([2.0, -0.5]), [-2.0, 1.2, 30.0]))
    assert early < late < peak
    assert gap(net(*I2)) == pytest.approx(0.125)
