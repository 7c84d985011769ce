"""The attack: where it works, where a wrong prior fits better, and what it may know. Acceptance 10 and 11."""

from __future__ import annotations

import ast
import inspect
from dataclasses import asdict, replace
from pathlib import Path
from statistics import fmean

import numpy as np
import pytest
import torch

from analysis.reconstruction import attack, samples, susceptibility, victim
from analysis.reconstruction.attack import (
    AttackPrior,
    AttackProblem,
    AttackSettings,
    Candidates,
    GridPoint,
    InitialValues,
)
from analysis.reconstruction.geometry import Geometry
from analysis.reconstruction.network import (
    Network,
    combination,
    flat,
    forward,
    outputs,
    patterns,
    recomputed,
    smoothed,
)
from analysis.reconstruction.scoring import Score, Target, score
from analysis.reconstruction.victim import Architecture
from harness.errors import InputError
from tests.analysis.reconstruction.problems import digits, norm_of, trained

ALPHA = 50.0


def _prior(kind: str = "none", per_class: int = 5) -> AttackPrior:
    ones = torch.ones(64, dtype=torch.float64)
    return AttackPrior(kind, float(digits(per_class).heldout.norm(dim=1).mean()), -ones, ones, 0.5 * ones)


def _settings(
    steps: int, task: str = "binary", geometry: Geometry | None = None, balance: str = "relative"
) -> AttackSettings:
    return AttackSettings(task, (1.0, -1.0), steps, balance, geometry, 1e-2)


def _run(
    network: Network,
    prior: AttackPrior,
    points: list[GridPoint],
    settings: AttackSettings,
    start: InitialValues | None = None,
) -> list[Candidates]:
    """Attack one network at several grid points."""
    return attack.run([AttackProblem(network, prior, point, start) for point in points], settings)


def _point(radius: float = 0.1, seed: int = 0, candidates: int = 20, lr: float = 0.02) -> GridPoint:
    return GridPoint(ALPHA, 0.005, 0.2, radius, candidates, lr, seed)


def _target(network: Network, per_class: int = 5) -> Target:
    data = digits(per_class)
    mean = torch.from_numpy(data.samples.mean)
    return Target("binary", network, data.x, data.labels, mean, data.samples.shape)


def _means(found: list[Score]) -> dict[str, float]:
    return {key: fmean(asdict(s)[key] for s in found) for key in asdict(found[0])}


@pytest.mark.parametrize("seeds", [(0,), pytest.param((1, 2), marks=pytest.mark.slow)])
def test_on_ten_digits_the_attack_works_and_wrong_priors_fit_better_than_the_truth(
    seeds: tuple[int, ...],
) -> None:
    """Configuration S. Measured over three seeds: NN 0.72, NCC 0.95 at R = 0.1; held out 1.53 and 0.70."""
    network = trained("gd", 5, 400, (500,))[0].network
    target, data = _target(network), digits(5)
    points = [_point(radius, seed) for radius in (0.1, 1.0, 3.0) for seed in seeds]
    found = _run(network, _prior(), points, _settings(3000))
    labels = attack.spread_labels((1.0, -1.0), 20)
    chance = _means(susceptibility.heldout(target, data.heldout, data.heldout_labels, labels, 30, 0))
    scores = {
        radius: _means([score(target, c.x, c.labels)[0] for c in found if c.point.radius == radius])
        for radius in (0.1, 1.0, 3.0)
    }
    assert scores[0.1]["nn_top5"] < 0.6 * chance["nn_top5"]
    assert scores[0.1]["ncc_top5"] > 0.9
    truth = susceptibility.true_residual("binary", network, data.x, data.labels, ALPHA)
    assert 5e-3 < truth < 3e-2
    assert all(c.residual < truth for c in found if c.point.radius > 0.5)
    assert scores[3.0]["nn_top5"] > 2.5
    # Single attacks reach 0.65 to 0.81 (four seeds), held-out images 0.67: a single one may be this far off by chance.
    assert abs(scores[3.0]["ncc_top5"] - chance["ncc_top5"]) < 0.15
    # Controls: noise scores below held-out digits, and those below means of pairs of training digits.
    noise = _means(susceptibility.gaussians(target, labels, _prior().typical_norm, 5, 0))
    pairs = _means(susceptibility.pair_means(target, 20, 5, 0))
    assert noise["ncc_top5"] < chance["ncc_top5"] - 0.2 < pairs["ncc_top5"]
    assert all(c.at_level is not None and c.level_step is not None and c.level_step < 3000 for c in found)


@pytest.mark.slow
def test_on_forty_digits_the_attack_is_no_better_than_held_out_images() -> None:
    """Configuration T: K far below the truth's 3.4e-2 at R = 1 and 3, and no recovery."""
    network = trained("gd", 20, 100, (10_000,))[0].network
    data = digits(20)
    target = _target(network, 20)
    points = [GridPoint(100.0, 0.05, 0.2, radius, 80, 0.02, 0) for radius in (0.1, 1.0, 3.0)]
    found = _run(network, _prior(per_class=20), points, _settings(3000))
    truth = susceptibility.true_residual("binary", network, data.x, data.labels, 100.0)
    assert truth == pytest.approx(3.4e-2, rel=0.5)
    assert all(c.residual < truth / 3 for c in found[1:])
    labels = attack.spread_labels((1.0, -1.0), 80)
    chance = _means(susceptibility.heldout(target, data.heldout, data.heldout_labels, labels, 30, 0))
    assert score(target, found[2].x, found[2].labels)[0].nn_top5 > 2 * chance["nn_top5"]
    assert score(target, found[0].x, found[0].labels)[0].ncc_top5 < chance["ncc_top5"] + 0.02


def test_a_matched_objective_aligns_better_than_the_published_one() -> None:
    network = trained("muon", 5, 400, (100,))[0].network
    chosen = norm_of("muon", 400)
    (matched,) = _run(network, _prior(), [_point()], _settings(250, geometry=chosen))
    (published,) = _run(network, _prior(), [_point()], _settings(250))
    assert matched.alignment > _alignment(network, published, chosen) + 0.05
    assert published.residual < matched.residual


def _alignment(network: Network, found: Candidates, chosen: Geometry) -> float:
    from analysis.reconstruction import geometry
    from analysis.reconstruction.network import factors

    done = forward(network, found.x, smoothed(ALPHA))
    return float(
        geometry.alignment(chosen, network, factors(network, done, (found.lambdas * found.labels)[:, None]))
    )


def test_the_residual_is_the_published_one_less_its_constants() -> None:
    network = trained("gd", 5, 400, (500,))[0].network
    (found,) = _run(network, _prior(), [_point()], _settings(50))
    theta = flat(network.parameters)
    for gates, residual in ((smoothed(ALPHA), found.residual), (recomputed, found.hard_residual)):
        u = combination(network, forward(network, found.x, gates), (found.lambdas * found.labels)[:, None])
        expected = (theta - flat(u)).square().sum() / theta.square().sum()
        assert residual == pytest.approx(float(expected), rel=1e-9)


@pytest.mark.parametrize("task", ["binary", "multiclass"])
def test_every_task_descends(task: str) -> None:
    """On a victim of the same task: the residual falls to a small part of that of random candidates."""
    held = samples.load("digits", None, [0, 1, 2] if task == "multiclass" else "odd_even", 4, 0)
    x, labels = torch.from_numpy(held.images), torch.from_numpy(held.labels)
    k = 3 if task == "multiclass" else 1
    begin = victim.initial(Architecture(64, (40,), k, False, 0.01), 0)
    options = victim.resolve_options("gd", {})
    (last,) = victim.train("gd", options, begin, x, labels, task, [1500])
    settings = AttackSettings(task, tuple(held.names), 600, "relative", None, 1e-2)
    (found,) = _run(last.network, _prior(), [_point(0.1, candidates=24)], settings)
    assert found.residual < 0.2 * found.history[0]
    # Control: the same candidates with labels of the wrong classes explain nothing.
    wrong = (1 - found.labels) % 3 if task == "multiclass" else -found.labels
    start = InitialValues(found.x, wrong, found.lambdas)
    (flipped,) = _run(last.network, _prior(), [found.point], replace(settings, steps=1), start)
    assert flipped.residual > 5 * found.residual


def test_priors_hold() -> None:
    network = trained("gd", 5, 400, (500,))[0].network
    (free,) = _run(network, _prior(), [_point(3.0)], _settings(300))
    (boxed,) = _run(network, _prior("box"), [_point(3.0)], _settings(300))
    (shifted,) = _run(network, _prior("offset"), [_point(0.1)], _settings(1))

    def outside(c: Candidates) -> float:
        return float((c.x.abs() > 1.05).double().mean())

    assert outside(boxed) < 0.02 < outside(free)
    assert float(shifted.x.mean()) == pytest.approx(0.5, abs=0.05)


def test_candidates_of_a_pca_prior_stay_in_the_components_of_public_images() -> None:
    """Oracle: scikit-learn's PCA of the same public images reproduces the candidates from 8 components."""
    from sklearn.decomposition import PCA

    from analysis.reconstruction import config, examination
    from analysis.reconstruction.subjects import ImageSet

    data, network = digits(5), trained("gd", 5, 400, (500,))[0].network
    images = ImageSet(data.samples, "binary", data.x, data.labels, data.heldout, data.heldout_labels)
    prior = examination.prior(config.load(["attack.prior=pca", "attack.components=8"]), images, 0.0)
    public = PCA(8, svd_solver="full").fit(data.samples.public)
    for start in (None, InitialValues(data.x, data.labels, torch.full((10,), 0.1, dtype=torch.float64))):
        (inside,) = _run(network, prior, [_point(candidates=10)], _settings(20), start)
        again = public.inverse_transform(public.transform(inside.x.numpy()))
        assert float((inside.x - torch.from_numpy(again)).abs().max()) < 1e-10
    (free,) = _run(network, _prior(), [_point()], _settings(20))
    again = public.inverse_transform(public.transform(free.x.numpy()))
    assert float((free.x - torch.from_numpy(again)).abs().max()) > 1e-2
    with pytest.raises(InputError, match=r"attack.components: 64 .*allowed: 1 to 63"):
        examination.prior(config.load(["attack.prior=pca", "attack.components=64"]), images, 0.0)


def test_one_alpha_is_another_attack_at_another_margin() -> None:
    """Scaling θ by c is scaling α by c: an identity for two layers, so a fixed α on raw weights is a confound.

    With θ' = cθ: h' = ch, u' = cu for the same λ, so that K is equal where the gates σ(αh) are.
    """
    network = trained("gd", 5, 400, (500,))[0].network
    scale = 0.2
    (unit,) = _run(network.scaled(scale), _prior(), [_point()], _settings(40))
    matched = replace(_point(), alpha=ALPHA * scale)
    raw, fixed = _run(network, _prior(), [matched, _point()], _settings(40))
    torch.testing.assert_close(raw.x, unit.x, rtol=0, atol=1e-7)
    assert raw.residual == pytest.approx(unit.residual, rel=1e-7)
    assert float((fixed.x - unit.x).abs().max()) > 1e-2


def test_the_public_balance_is_that_of_the_public_code() -> None:
    """Oracle by autograd, in the public code's variables: l = mλ, a factor 1/m, ‖θ − u‖² unnormalized."""
    network = trained("gd", 5, 400, (500,))[0].network
    point = replace(_point(candidates=6), lambda_min=0.15)
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(6, 64, generator=generator, dtype=torch.float64)
    lambdas = torch.rand(6, generator=generator, dtype=torch.float64) * 0.3
    labels = attack.spread_labels((1.0, -1.0), 6)
    start = InitialValues(x, labels, lambdas)
    weights = [w.clone().requires_grad_(True) for w in network.weights]
    # With a sharp gate the surrogate is the ReLU itself.
    outputs_ = ((x @ weights[0].T).relu() @ weights[1].T)[:, 0]
    public = 6 * lambdas
    u = torch.autograd.grad((outputs_ * public * labels).sum() / 6, weights)
    squared = sum((w.detach() - g).square().sum() for w, g in zip(weights, u))
    expected = float(squared + 5 * (6 * 0.15 - public).relu().square().sum())
    for balance in ("public", "relative"):
        batch = attack._Batch(
            [AttackProblem(network, _prior(), replace(point, alpha=1e9), start)],
            _settings(1, balance=balance),
        )
        loss = float(batch._loss()[0])
        assert (loss == pytest.approx(expected, rel=1e-9)) == (balance == "public")


def test_networks_share_a_batch() -> None:
    """Two victims, their raw and scaled weights, and an oracle start, together as one by one."""
    first, second = (c.network for c in trained("gd", 5, 400, (300, 500)))
    problems = [
        AttackProblem(network, _prior(), _point(seed=seed))
        for seed, network in enumerate((first, second, second.scaled(0.1)))
    ]
    together = attack.run(problems, _settings(30))
    for problem, found in zip(problems, together):
        (alone,) = attack.run([problem], _settings(30))
        torch.testing.assert_close(found.x, alone.x, rtol=0, atol=1e-6)
        assert found.residual == pytest.approx(alone.residual, rel=1e-6)
    assert float((together[0].x - together[1].x).abs().max()) > 1e-2


def test_a_batch_is_its_points_one_by_one() -> None:
    """Different α, λ_min, radius, lr and numbers of candidates in one call."""
    network = trained("gd", 5, 400, (500,))[0].network
    points = [
        GridPoint(50.0, 0.005, 0.2, 0.1, 20, 0.02, 0),
        GridPoint(200.0, 0.02, 0.5, 3.0, 20, 0.01, 1),
        GridPoint(50.0, 0.005, 0.2, 1.0, 11, 0.02, 2),
    ]
    together = _run(network, _prior(), points, _settings(60))
    for point, found in zip(points, together):
        (alone,) = _run(network, _prior(), [point], _settings(60))
        # Batched products sum in another order.
        torch.testing.assert_close(found.x, alone.x, rtol=0, atol=1e-6)
        assert found.point == point
    assert together[2].x.shape == (11, 64)
    assert together[2].labels.tolist() == [1.0] * 6 + [-1.0] * 5


def test_same_seed_same_candidates() -> None:
    network = trained("gd", 5, 400, (500,))[0].network
    first, second, other = (
        _run(network, _prior(), [_point(seed=seed)], _settings(80))[0] for seed in (0, 0, 1)
    )
    assert torch.equal(first.x, second.x)
    assert torch.equal(first.lambdas, second.lambdas)
    assert first.history == second.history
    assert not torch.equal(first.x, other.x)


def test_the_oracle_is_the_ceiling_and_drifts_off() -> None:
    network = trained("gd", 5, 400, (500,))[0].network
    target = _target(network)
    point, start = susceptibility.oracle(target, ALPHA, 0.2, 0)
    (found,) = _run(network, _prior(), [point], _settings(1000), start)
    figures = score(target, found.x, found.labels)[0]
    assert figures.ncc_top5 > 0.97
    assert 0.1 < float((found.x - target.x).norm(dim=1).median()) < 1.5
    assert found.residual < susceptibility.true_residual("binary", network, target.x, target.labels, ALPHA)


def test_the_attack_cannot_reach_training_images_or_scores() -> None:
    """Its module imports nothing that loads or scores images, and its entry takes no images but declared starts."""
    source = Path(inspect.getfile(attack)).read_text(encoding="utf-8")
    imported = {
        node.module: {name.name for name in node.names}
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.ImportFrom) and node.module
    }
    ours = {module for module in imported if module.startswith("analysis")}
    assert ours == {
        "analysis.reconstruction",
        "analysis.reconstruction.geometry",
        "analysis.reconstruction.network",
    }
    assert imported["analysis.reconstruction"] == {"geometry"}
    assert set(inspect.signature(attack.run).parameters) == {"problems", "settings", "progress"}
    assert set(AttackProblem.__dataclass_fields__) == {"network", "prior", "point", "start"}
    assert set(AttackPrior.__dataclass_fields__) == {"kind", "typical_norm", "low", "high", "center", "basis"}
    for word in ("samples", "scoring", "heldout", "Target"):
        assert word not in source


@pytest.mark.parametrize("kind", ["none", "box", "pca", "offset"])
def test_the_declared_prior_does_not_depend_on_the_training_images(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other private images with another mean, or a secret offset, over the same public pool: the same prior."""
    from analysis.reconstruction import config, examination, subjects

    def made(*words: str, believed: float = 0.0) -> AttackPrior:
        keys = config.load([f"attack.prior={kind}", *words])
        (images,), _ = subjects.load(keys)
        return examination.prior(keys, images, believed)

    def same(one: AttackPrior, two: AttackPrior) -> bool:
        return all(
            torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
            for a, b in ((getattr(one, name), getattr(two, name)) for name in vars(one))
        )

    known = made()
    assert same(known, made("offset=3"))
    # Controls: what the attacker declares and what is public does change it.
    moved = made(believed=3.0)
    assert not same(known, moved)
    # Candidates that start around the offset start as far from it, wherever it is.
    assert (moved.typical_norm == known.typical_norm) == (kind == "offset")
    pixels, digit, shape = samples._raw("digits", None)
    chosen = samples.load("digits", None, "odd_even", 5, 0)
    private = np.abs(pixels[:, None] - (chosen.images + chosen.mean)[None]).max(-1).min(-1) < 1e-9
    assert private.sum() == 10
    for is_changed, remains in ((private, True), (~private, False)):
        changed = np.where(is_changed[:, None], pixels**2 + 5 * np.arange(64), pixels)
        monkeypatch.setattr(samples, "_raw", lambda *_, found=changed: (found, digit, shape))
        assert same(known, made()) == remains


def test_reconstructions_are_averages_of_their_group() -> None:
    """A (label, pattern) group shows its λ-weighted mean: replacing the group by it leaves Φ and u as they are."""
    from analysis.reconstruction.certificate import groups

    network = trained("gd", 5, 400, (500,))[0].network
    data = digits(5)
    number = groups(network, data.x, data.labels)
    sizes = torch.bincount(number)
    assert int(sizes.sum()) == 10
    for group in (sizes > 1).nonzero()[:, 0]:
        members = number == group
        mean = data.x[members].mean(0, keepdim=True)
        assert torch.equal(patterns(network, mean)[0][0], patterns(network, data.x[members])[0][0])
        torch.testing.assert_close(
            outputs(network, mean), outputs(network, data.x[members]).mean(0, keepdim=True)
        )
