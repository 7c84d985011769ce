"""Mode `disks`: the points, the bracket against exact margins, and the report."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy import stats

from analysis.margin import disks
from analysis.margin.config import load
from analysis.margin.net import exact_margin
from analysis.margin.points import pair
from analysis.margin.trajectory import MarginRun
from tests.analysis.margin.toys import I1, I2, A, net, random_net, states


def quiet(_: str) -> None:
    """Says nothing."""


@pytest.mark.parametrize("dim", [1, 2, 10])
def test_points_are_uniform_in_two_balls_whose_nearest_points_are_the_units(dim: int) -> None:
    points = disks.balls(4000, dim, 0.5, np.random.default_rng(0))
    centre = np.zeros(dim)
    centre[0] = 1.5
    distance = np.linalg.norm(points.x - points.y[:, None] * centre, axis=1)
    assert distance.max() <= 0.5
    # Uniform: (distance/r)^dim is uniform in [0, 1].
    assert np.quantile((2.0 * distance) ** dim, (0.25, 0.5, 0.75)) == pytest.approx(
        (0.25, 0.5, 0.75), abs=0.03
    )
    assert points.margin_optimum >= 1.0
    assert points.y.sum() == 0.0


def test_two_neurons_on_two_points_are_bracketed_to_their_exact_margin() -> None:
    for start in (I1, I2):
        state = states(net(*start), [0, 1000])[-1]
        exact = exact_margin(state, A.points).value
        lower, upper = disks.bracket(state, A.points, seed=0)
        assert lower <= exact * (1.0 + 1e-9)
        assert (lower, upper) == pytest.approx((exact, exact), rel=1e-6)


def test_two_neurons_in_space_lie_in_the_bracket() -> None:
    points = pair(1.0, 1.0, dim=3)
    state = net([[1.2, 0.7, -0.3], [-0.4, 0.5, 0.9]])
    exact = exact_margin(state, points).value
    lower, upper = disks.bracket(state, points, seed=0)
    assert lower <= exact * (1.0 + 1e-9)
    assert upper == pytest.approx(exact, rel=1e-4)
    assert disks.bracket(net([[-1.2, 0.7, -0.3], [0.4, 0.5, 0.9]]), points, seed=0) == (0.0, 0.0)


def test_the_two_outputs_differ_by_f() -> None:
    state = random_net(0, 7, dim=4)
    points = disks.balls(5, 4, 0.5, np.random.default_rng(0))
    import torch

    scores = disks.sequential(state)(torch.tensor(points.x)).detach().numpy()
    assert scores[:, 1] - scores[:, 0] == pytest.approx(disks.outputs(state, points)[:, 0])


def test_runs_differ_in_points_and_weights_and_are_reported_with_their_spread() -> None:
    words = ["mode=disks", "k=8", "dim=2", "points=3", "runs=3", "steps=300", "lr=0.05", "optimizer=gd,adam"]
    config = load(words)
    runs = disks.run_disks(config, quiet)
    assert len(runs) == 12
    assert len({run.facts["margin_opt"] for run in runs}) == 3
    wide = [run for run in runs if run.optimizer == "gd"]
    for run in wide:
        assert all(row["share_lower"] <= row["share"] * (1.0 + 1e-9) <= 1.0 + 1e-6 for row in run.rows)
    partner = next(run for run in runs if run.optimizer == "gd, two neurons")
    assert partner.facts["margin_opt"] == wide[0].facts["margin_opt"]
    report = disks.report(config, runs)
    shares = [run.rows[-1]["share"] if run.status == "ok" else 0.0 for run in wide]
    last = [row for row in report.table if row["optimizer"] == "gd"][-1]
    assert last["wide net, attack"] == pytest.approx(np.mean(shares))
    assert last["wide net, attack sd"] == pytest.approx(np.std(shares, ddof=1))
    (row, _) = report.more["wide_net_less_two_neurons_at_the_end"]
    assert row["by the certificate"] <= row["by the attack"]


def test_nets_that_do_not_separate_count_as_zero() -> None:
    def made(name: str, shares: list[list[float]], statuses: list[str]) -> list[MarginRun]:
        rows: list[list[Any]] = [
            [
                {"t": 10.0**k, "margin": s, "share": s, "share_lower": 0.5 * s, "log_loss": -s}
                for k, s in enumerate(of_run)
            ]
            for of_run in shares
        ]
        return [MarginRun(name, n, status, rows=rows[n]) for n, status in enumerate(statuses)]

    # The second net does not separate, the third diverges after its first state: neither makes the mean larger.
    runs = made("gd", [[0.2, 0.8], [0.0, 0.0], [0.4]], ["ok", "not_separated", "diverged"])
    runs += made("gd, two neurons", [[0.5, 0.9], [0.5, 0.7], [0.3, -0.2]], ["ok", "ok", "not_separated"])
    report = disks.report(load(["mode=disks", "runs=3", "steps=10", "optimizer=gd"]), runs)
    first, last = report.table
    assert first["wide net, attack"] == pytest.approx(0.6 / 3)
    assert last["wide net, attack"] == pytest.approx(0.8 / 3)
    assert last["two neurons"] == pytest.approx(1.6 / 3)
    assert (last["wide nets that separate"], last["two neurons that separate"]) == (1, 2)
    assert last["ln loss, wide"] == pytest.approx(-0.4)
    (row,) = report.more["wide_net_less_two_neurons_at_the_end"]
    differences = np.array([0.8, 0.0, 0.0]) - np.array([0.9, 0.7, 0.0])
    expected = stats.ttest_1samp(differences, 0.0).confidence_interval(0.95)
    assert row["by the attack"] == pytest.approx(differences.mean())
    assert (row["by the attack low"], row["by the attack high"]) == pytest.approx(
        (expected.low, expected.high)
    )
    assert report.notes == ["3 of 6 nets do not separate their points; their share counts as 0"]
    assert "1 and 2 of 3 separate" in report.headline
