"""Victims: span law, convergence, alternatives on trained weights: acceptance 6, 7 and 9, and 11 for training."""

from __future__ import annotations

import pytest
import torch

from analysis.reconstruction import alternatives, certificate, multipliers, victim
from analysis.reconstruction.alternatives import KktPoint
from analysis.reconstruction.geometry import Geometry, polar
from analysis.reconstruction.network import Network
from analysis.reconstruction.victim import Architecture
from harness.errors import InputError
from optimizers import OptionError
from tests.analysis.reconstruction.problems import Data, digits, start, trained


def _problem(network: Network, data: Data) -> KktPoint:
    margin = multipliers.least_margin("binary", network, data.x, data.labels)
    unit = network.scaled(margin**-0.5)
    fit = multipliers.fit("binary", unit, data.x, data.labels)
    return KktPoint("binary", unit, data.x, data.labels, fit.lambdas, certificate.data_span(data.x))


@pytest.mark.parametrize(
    ("optimizer", "most"),
    [("gd", 1e-10), ("muon_svd", 1e-10), ("sumo", 1e-10), ("galore", 1e-10), ("muon", 2e-2)],
)
def test_updates_stay_in_the_span_of_the_images(optimizer: str, most: float) -> None:
    """`muon` runs Newton–Schulz, which rounds in fp32 and scales up what is nearly nothing."""
    data, network = digits(20), trained(optimizer, 20, 100, (500,))[0].network
    change = network.weights[0] - start(100).weights[0]
    where = certificate.data_span(data.x)
    assert (where.rank, where.outside.shape[0], int(where.dead.sum())) == (39, 25, 11)
    assert certificate.outside_share(change, where) <= most
    assert float(change[:, where.dead].norm() / change.norm()) <= 1e-10


def test_adam_leaves_the_span_but_not_dead_pixels() -> None:
    data, network = digits(20), trained("adamw", 20, 100, (500, 5000))[0].network
    change = network.weights[0] - start(100).weights[0]
    where = certificate.data_span(data.x)
    assert certificate.outside_share(change, where) > 0.1
    assert float(change[:, where.dead].norm() / change.norm()) <= 1e-10


STEPS = (1_000, 10_000)


@pytest.mark.parametrize(
    "steps", [STEPS, pytest.param((*STEPS, 60_000), marks=pytest.mark.slow)], ids=["10k", "60k"]
)
def test_long_training_converges_in_the_sense_of_clarke(steps: tuple[int, ...]) -> None:
    """The fixed-gate residual stays near 0.3 for ever; the Clarke one falls, and freedom grows."""
    data = digits(20)
    rows = [
        certificate.certify("binary", c.network, data.x, data.labels, Geometry("l2"), start(100))
        for c in trained("gd", 20, 100, steps)
    ]
    assert 0.25 <= rows[-1].residual <= 0.33
    clarke = [row.residual_clarke for row in rows]
    assert all(value is not None for value in clarke)
    falling = [value for value in clarke if value is not None]
    assert falling == sorted(falling, reverse=True)
    assert falling[-1] < 0.10
    # Clipping the multipliers to the bound that least squares left out changes little.
    for row in rows:
        assert row.residual_clarke is not None
        assert row.residual_clarke_upper is not None
        assert row.residual_clarke <= row.residual_clarke_upper <= row.residual_clarke + 0.05
    # W₁(t)P_⊥ = W₁(0)P_⊥: the share falls as 1/‖W₁‖, and margins grow as ‖θ‖².
    sizes = [c.network.weights[0].norm() for c in trained("gd", 20, 100, steps)]
    for row, size in zip(rows[1:], sizes[1:]):
        assert row.outside * float(size) == pytest.approx(rows[0].outside * float(sizes[0]), rel=1e-6)
    radii = [row.split_radius for row in rows]
    assert radii[0] is not None
    assert radii[-1] is not None
    assert radii[-1] > 3 * radii[0]


def test_a_far_alternative_on_trained_weights() -> None:
    data = digits(20)
    problem = _problem(trained("gd", 20, 100, STEPS)[-1].network, data)
    made = alternatives.null_split(problem, 1000.0, 0)
    assert made is not None
    row = alternatives.verify(problem, made, is_exact=False)
    # W₁'s share outside the span: 2.2e-3 after 10,000 steps.
    assert row.projection_change < 3e-3
    assert row.residual_inherited == pytest.approx(row.residual_original, abs=1e-6)
    assert row.residual_projected == pytest.approx(row.residual_original_projected, abs=1e-6)
    assert row.nn_distance >= 500
    assert row.passed
    # Recomputed gates without the projection: the tiny rest outside the span flips near-kinked pairs.
    assert row.residual > 10
    for control in alternatives.controls(problem, 0):
        assert not alternatives.verify(problem, control, is_exact=False).passed


def test_adam_has_far_alternatives_along_dead_pixels_only() -> None:
    data = digits(20)
    problem = _problem(trained("adamw", 20, 100, (500, 5000))[-1].network, data)
    null = alternatives.null_split(problem, 100.0, 0)
    dead = alternatives.dead_pixel_split(problem, 100.0, 0)
    assert null is not None
    assert dead is not None
    refused, accepted = (alternatives.verify(problem, made, is_exact=False) for made in (null, dead))
    assert not refused.passed
    assert refused.margin_min < 0
    assert accepted.passed
    assert accepted.margin_min > 0.9


def test_the_polar_factor_is_scipys() -> None:
    from scipy.linalg import polar as oracle

    matrix = torch.randn(9, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(polar(matrix), torch.from_numpy(oracle(matrix.numpy())[0]), rtol=0, atol=1e-12)


def test_same_seed_same_weights() -> None:
    data = digits(5)
    found = []
    for seed in (3, 3, 4):
        begin = victim.initial(Architecture(64, (20,), 1, True, 1e-2), seed)
        settings = victim.resolve_options("sumo", {})
        found.append(
            next(iter(victim.train("sumo", settings, begin, data.x, data.labels, "binary", [30]))).network
        )
    assert all(torch.equal(a, b) for a, b in zip(found[0].parameters, found[1].parameters))
    assert not torch.equal(found[0].weights[0], found[2].weights[0])


@pytest.mark.parametrize("optimizer", ["gd", "adamw", "muon", "galore"])
def test_three_classes_and_three_layers(optimizer: str) -> None:
    from analysis.reconstruction import samples

    held = samples.load("digits", None, [0, 1, 2], 4, 0)
    x, labels = torch.from_numpy(held.images), torch.from_numpy(held.labels)
    begin = victim.initial(Architecture(64, (40, 30), 3, True, 0.1), 0)
    settings = victim.resolve_options(optimizer, {})
    (last,) = victim.train(optimizer, settings, begin, x, labels, "multiclass", [400])
    row = certificate.certify("multiclass", last.network, x, labels, Geometry("l2"), begin)
    assert row.margin_min > 0
    assert row.residual_clarke is None
    # Euler's identity holds at any degree once λ is the least-squares one: ⟨θ, u⟩ = ‖u‖².
    assert row.identity_error == pytest.approx(row.residual**2, abs=1e-8)


def test_what_does_not_separate_gets_no_certificate() -> None:
    data = digits(5)
    with pytest.raises(
        InputError, match="does not separate its training images, so no certificate is claimed"
    ):
        certificate.certify("binary", start(100), data.x, data.labels, Geometry("l2"))
    broken = start(100).with_first(start(100).weights[0] * float("nan"))
    with pytest.raises(InputError, match="not all finite"):
        certificate.certify("binary", broken, data.x, data.labels, Geometry("l2"))


def test_options_are_checked() -> None:
    with pytest.raises(OptionError, match="rnak"):
        victim.resolve_options("sumo", {"rnak": 3})
    with pytest.raises(OptionError, match="is not an option of gd"):
        victim.resolve_options("gd", {"momentum": 0.9})
    assert victim.resolve_options("adamw", {})["eps"] == 1e-12
    assert victim.resolve_options("adamw", {"weight_decay": 0.3})["weight_decay"] == 0.3
