"""Distances, SSIM, best buddies, votes; advantages and intervals."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import bootstrap, ttest_1samp

from analysis.reconstruction import scoring, susceptibility
from analysis.reconstruction.network import outputs
from analysis.reconstruction.scoring import Target, score
from tests.analysis.reconstruction.problems import digits, trained


def _target() -> Target:
    data = digits(5)
    network = trained("gd", 5, 400, (500,))[0].network
    return Target(
        "binary", network, data.x, data.labels, torch.from_numpy(data.samples.mean), data.samples.shape
    )


def test_the_training_images_score_best() -> None:
    target = _target()
    figures, found = score(target, target.x, target.labels)
    assert figures.nn_top5 == 0
    assert figures.ncc_top5 == pytest.approx(1, abs=1e-12)
    assert figures.ssim_top5 == pytest.approx(1, abs=1e-9)
    assert figures.good == 10
    assert bool(found.buddies.all())
    worse, _ = score(target, -target.x, target.labels)
    assert worse.ncc_top5 < 0.9
    assert worse.nn_top5 > 0.5


def test_distances_are_scipys() -> None:
    from scipy.spatial.distance import cdist, directed_hausdorff

    g = torch.Generator().manual_seed(0)
    a, b = (torch.randn(n, 8, generator=g, dtype=torch.float64) for n in (5, 7))
    np.testing.assert_allclose(scoring.nearest(a, b)[0].numpy(), cdist(a, b).min(1), rtol=1e-12)
    expected = max(directed_hausdorff(a, b)[0], directed_hausdorff(b, a)[0])
    assert scoring.hausdorff(a, b) == pytest.approx(expected, rel=1e-12)
    np.testing.assert_allclose(scoring.correlations(a, b).numpy(), np.corrcoef(a, b)[:5, 5:], atol=1e-12)
    assert float(scoring.correlations(torch.ones(1, 8).double(), b).abs().max()) == 0


def test_ssim_by_its_definition() -> None:
    """Independent oracle: loops over windows, straight from Wang et al. 2004."""
    rng = np.random.default_rng(0)
    a, b = rng.random((8, 8)), rng.random((8, 8))
    values = []
    for i in range(6):
        for j in range(6):
            p, q = a[i : i + 3, j : j + 3], b[i : i + 3, j : j + 3]
            cov = ((p - p.mean()) * (q - q.mean())).mean()
            top = (2 * p.mean() * q.mean() + 1e-4) * (2 * cov + 9e-4)
            values.append(top / ((p.mean() ** 2 + q.mean() ** 2 + 1e-4) * (p.var() + q.var() + 9e-4)))
    assert scoring.ssim(a, b) == pytest.approx(np.mean(values), abs=1e-12)
    colour = np.stack([a, b, a])
    assert scoring.ssim(colour, colour) == pytest.approx(1, abs=1e-12)


def test_a_candidate_serves_one_training_image() -> None:
    """Best buddies: a single blurry candidate cannot count for all ten."""
    target = _target()
    blur = target.x.mean(0, keepdim=True) + target.x[:1]
    figures, found = score(target, blur.repeat(20, 1), torch.ones(20, dtype=torch.float64))
    assert int(found.buddies.sum()) <= 1
    assert figures.good <= 1


def test_votes_average_what_is_nearly_as_near() -> None:
    target = _target()
    centred = target.x[0] - target.x[0].mean()
    noise = torch.randn(64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    noise -= noise.mean()
    noise -= noise @ centred / centred.square().sum() * centred
    # Two candidates of equal correlation on either side: their mean is the image itself.
    pair = torch.stack([target.x[0] + 0.05 * noise, target.x[0] - 0.05 * noise])
    found = scoring.matches(target, torch.cat([pair, target.x[1:]]))
    assert float((found.image[0] - target.x[0]).norm()) < 1e-9
    # Control: one that is farther than 1.1 of the best does not vote.
    far = torch.stack([target.x[0] + 0.05 * noise, target.x[0] - 0.06 * noise])
    found = scoring.matches(target, torch.cat([far, target.x[1:]]))
    assert torch.equal(found.image[0], far[0])


def test_the_margin_undoes_the_scale_gauge() -> None:
    target = _target()
    scaled, _ = score(target, 7 * target.x, target.labels)
    plain, _ = score(target, target.x, target.labels)
    assert scaled.nn_top5 > 5
    assert scaled.nn_top5_margin == pytest.approx(plain.nn_top5_margin, abs=1e-9)
    moved = scoring.on_margin(target, 7 * target.x, target.labels)
    least = (outputs(target.network, target.x)[:, 0] * target.labels).min()
    torch.testing.assert_close(outputs(target.network, moved)[:, 0] * target.labels, least.expand(10))


def test_intervals_are_students() -> None:
    values = [0.3, 0.5, 0.45, 0.2]
    mean, half = susceptibility.interval(values)
    low, high = ttest_1samp(values, 0).confidence_interval(0.95)
    assert half is not None
    assert (mean - half, mean + half) == (pytest.approx(low), pytest.approx(high))
    assert susceptibility.interval([0.3]) == (0.3, None)
    wide = bootstrap((values,), np.mean, rng=0, confidence_level=0.95).confidence_interval
    assert half > (wide.high - wide.low) / 2


def test_susceptibility_chooses_by_the_attackers_criterion_alone() -> None:
    base = {"optimizer": "gd", "step": 10, "candidates": 20}
    attack = {
        **base,
        "kind": "attack",
        "objective": "l2",
        "prior": "none",
        "radius": 0.1,
        "beats_truth": True,
    }
    rows = [
        {**base, "seed": 0, "kind": "heldout", "nn_top5": 2.0, "nn_top5_margin": 2.0, "ncc_top5": 0.5},
        # Fits best, recovers nothing; the other one recovers everything and fits worse.
        {
            **attack,
            "seed": 0,
            "attack_seed": 0,
            "residual": 0.1,
            "nn_top5": 2.0,
            "nn_top5_margin": 2.0,
            "ncc_top5": 0.5,
        },
        {
            **attack,
            "seed": 0,
            "attack_seed": 0,
            "residual": 0.9,
            "nn_top5": 0.0,
            "nn_top5_margin": 0.0,
            "ncc_top5": 1.0,
        },
    ]
    (row,) = susceptibility.rows(rows)
    assert row["advantage_nn_top5"] == 0
    assert row["advantage_ncc_top5"] == 0
    assert row["beats_truth"] == 1
    assert row["half_width_nn_top5"] is None
    rows[1]["residual"] = 1.0
    (row,) = susceptibility.rows(rows)
    assert row["advantage_nn_top5_margin"] == 1
    assert row["advantage_ncc_top5"] == 1
