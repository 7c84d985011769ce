"""Distances, SSIM, best buddies, votes; advantages and intervals."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import bootstrap, ttest_1samp, ttest_ind, ttest_rel

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
    # Only the reconstruction is stretched to [0, 1], as published; the truth may not reach both ends.
    assert figures.ssim_top5_published is not None
    assert figures.ssim_top5_published > 0.98
    assert figures.ssim_top5_mutual == pytest.approx(1, abs=1e-9)
    assert figures.good_published == figures.good_mutual == figures.buddies_published == 10
    # Moved onto the margin, which not all of them have reached after 500 steps.
    assert figures.hits_25 == 1
    assert bool(found.buddies.all())
    worse, _ = score(target, -target.x, target.labels)
    assert worse.ncc_top5 < 0.9
    assert worse.nn_top5 > 0.5
    assert worse.hits_10 == 0


@pytest.mark.parametrize("offset", [0.0, 0.5, 3.0])
def test_published_ssim_of_images_with_themselves_at_any_offset(offset: float) -> None:
    """The secret offset is taken off before SSIM; truths that fill [0, 1] have exactly 1."""
    network = trained("gd", 5, 400, (500,))[0].network
    rng = np.random.default_rng(0)
    pixels = torch.from_numpy(np.stack([scoring.stretched(image) for image in rng.random((10, 64))]))
    mean = pixels.mean(0)
    target = Target("binary", network, pixels - mean + offset, digits(5).labels, mean, (8, 8), offset)
    figures, _ = score(target, target.x, target.labels)
    assert figures.ssim_top5_published == pytest.approx(1, abs=1e-9)
    assert figures.good_published == 10
    if offset:
        # Control: with the offset left in they are no pixels, and published SSIM is not defined.
        figures, found = score(replace(target, offset=0.0), target.x, target.labels)
        assert figures.ssim_top5_published is None
        assert figures.good_published is None
        assert float(found.ssim.max()) < 0.9


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
    assert scoring.ssim(a[None], b[None])[0] == pytest.approx(np.mean(values), abs=1e-12)
    colour = np.stack([a, b, a])
    assert scoring.ssim(np.stack([colour, 1 - colour]), np.stack([colour, colour]))[0] == pytest.approx(
        1, abs=1e-12
    )
    assert scoring.ssim(colour[None], 1 - colour[None])[0] < 0.5


def test_published_ssim_by_its_definition() -> None:
    """Oracle: convolutions over reflected borders with the window of Gaussian weights, σ = 1.5, in torch."""
    from torch.nn.functional import conv2d, pad

    rng = np.random.default_rng(0)
    truth, made = 0.2 + 0.3 * rng.random((8, 8)), rng.standard_normal((8, 8))
    weights = torch.exp(-(torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64) ** 2) / 4.5)
    window = (weights[:, None] * weights)[None, None] / weights.sum() ** 2

    def mean(image: torch.Tensor) -> torch.Tensor:
        return conv2d(pad(image[None, None], (1, 1, 1, 1), mode="reflect"), window)[0, 0]

    p = torch.from_numpy((made - made.min()) / (made.max() - made.min()))
    q = torch.from_numpy(truth)
    mp, mq = mean(p), mean(q)
    vp, vq, cov = mean(p * p) - mp**2, mean(q * q) - mq**2, mean(p * q) - mp * mq
    expected = ((2 * mp * mq + 1e-4) * (2 * cov + 9e-4)) / ((mp**2 + mq**2 + 1e-4) * (vp + vq + 9e-4))
    found = scoring.ssim_published(made[None], truth[None])[0]
    assert found == pytest.approx(float(expected.mean()), abs=1e-12)
    # Scale of the reconstruction does not count, that of the truth does.
    assert scoring.ssim_published(7 * made[None] - 3, truth[None])[0] == pytest.approx(found, abs=1e-12)
    assert abs(scoring.ssim_published(made[None], scoring.stretched(truth)[None])[0] - found) > 0.01


def test_best_buddies_and_votes_as_published() -> None:
    """Oracle: the public post-processing in loops. Candidates go to their nearest image; an image takes its best."""
    target = _target()
    more = 0
    for seed in range(20):
        g = torch.Generator().manual_seed(seed)
        picked = torch.randint(10, (20,), generator=g)
        noise = torch.randn(20, 64, generator=g, dtype=torch.float64)
        x = target.x[picked] + 0.4 * noise
        distance = 2 * (1 - np.corrcoef(target.x.numpy(), x.numpy())[:10, 10:])
        found, mutual = scoring.matches(target, x), scoring.mutual_matches(target, x)
        for i in range(10):
            own = [j for j in range(20) if distance[:, j].argmin() == i]
            assert bool(found.buddies[i]) == bool(own)
            if own:
                best = min(own, key=lambda j: distance[i, j])
                voters = [j for j in own if distance[i, j] <= 1.1 * distance[i, best]]
                torch.testing.assert_close(found.image[i], x[voters].mean(0))
                assert int(found.candidate[i]) == best
        # The stricter variant: the best of all candidates must be nearest to this very image.
        assert not bool((mutual.buddies & ~found.buddies).any())
        more += int(found.buddies.sum()) - int(mutual.buddies.sum())
    assert more > 0


def test_a_candidate_serves_one_training_image() -> None:
    """A single blurry candidate cannot count for all ten, in either variant."""
    target = _target()
    blur = target.x.mean(0, keepdim=True) + target.x[:1]
    figures, found = score(target, blur.repeat(20, 1), torch.ones(20, dtype=torch.float64))
    assert int(found.buddies.sum()) <= 1
    assert figures.good_published is not None
    assert max(figures.good_published, figures.good_mutual, figures.buddies_mutual) <= 1


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


def _attack_row(data_set: int, nn: float, ncc: float = 0.5, **columns: Any) -> dict[str, Any]:
    row: dict[str, Any] = {
        "optimizer": "gd", "step": 10, "data_set": data_set, "seed": 0, "attack_seed": 0, "candidates": 20,
        "kind": "attack", "objective": "l2", "weights": "margin", "prior": "none", "radius": 0.1,
        "offset": 0.0, "residual": 0.1,
        "beats_truth": True, "nn_top5": nn, "nn_top5_margin": nn, "ncc_top5": ncc,
    }  # fmt: skip
    return {**row, **columns}


def _heldout_row(
    data_set: int, raw: float = 2.0, scaled: float = 2.0, **columns: object
) -> dict[str, object]:
    return _attack_row(data_set, raw) | {"kind": "heldout", "nn_top5_margin": scaled, **columns}


def test_susceptibility_chooses_by_the_attackers_criterion_alone() -> None:
    # Fits best, recovers nothing; the other one recovers everything and fits worse.
    rows = [_heldout_row(0), _attack_row(0, 2.0), _attack_row(0, 0.0, 1.0, residual=0.9)]
    (row,) = susceptibility.rows(rows)
    assert row["advantage_nn_top5"] == 0
    assert row["advantage_ncc_top5"] == 0
    assert row["beats_truth"] == 1
    assert row["half_width_nn_top5"] is None
    rows[1]["residual"] = 1.0
    (row,) = susceptibility.rows(rows)
    assert row["advantage_nn_top5_margin"] == 1
    assert row["advantage_ncc_top5"] == 1


def test_chance_is_the_nearer_of_held_out_images_as_they_are_and_rescaled() -> None:
    """An attack as near as untouched held-out images has no advantage, however far rescaling moved those."""
    (row,) = susceptibility.rows([_heldout_row(0, raw=1.5, scaled=3.0), _attack_row(0, 1.5)])
    assert row["advantage_nn_top5_margin"] == 0
    (row,) = susceptibility.rows([_heldout_row(0, raw=3.0, scaled=1.5), _attack_row(0, 1.5)])
    assert row["advantage_nn_top5_margin"] == 0
    assert row["advantage_nn_top5"] == 0.5


def test_paired_differences_are_scipys_over_sets_of_images() -> None:
    """Training and optimizers: Student's paired interval; victims of one set are no replicates of the data."""
    rng = np.random.default_rng(0)
    early, late, muon = (list(rng.uniform(0.2, 1.8, 8)) for _ in range(3))
    rows = []
    for k in range(8):
        for seed in range(3):
            for step, values in ((10, early), (1000, late)):
                shift = 0.1 * (seed - 1)
                rows += [
                    _heldout_row(k, step=step, seed=seed),
                    _attack_row(k, values[k] + shift, step=step, seed=seed),
                ]
            rows += [
                _heldout_row(k, step=500, seed=seed, optimizer="muon"),
                _attack_row(k, muon[k], step=500, seed=seed, optimizer="muon"),
            ]
    found = {(r["contrast"], r["measure"]): r for r in susceptibility.paired(rows)}
    assert len(found) == 4
    trend, pair = found["training", "nn_top5_margin"], found["optimizers", "nn_top5_margin"]
    for row, a, b in (
        (trend, late, early),
        (pair, [(2 - v) / 2 for v in late], [(2 - v) / 2 for v in muon]),
    ):
        expected = ttest_rel(a, b).confidence_interval(0.95)
        low, high = row["difference"] - row["half_width"], row["difference"] + row["half_width"]
        assert (low, high) == (pytest.approx(expected.low), pytest.approx(expected.high))
        assert row["data_sets"] == 8
    assert trend["pair"] == "gd: step 1000 − 10"
    assert trend["p"] == pytest.approx(ttest_rel(late, early).pvalue)
    assert trend["leaks_more"] == sum(a < b for a, b in zip(late, early))
    assert pair["leaks_more"] == sum(a < b for a, b in zip(late, muon))
    # Control: pairing matters; two unpaired samples have another interval.
    other = ttest_ind(late, early).confidence_interval(0.95)
    assert abs((other.high - other.low) / 2 - trend["half_width"]) > 0.01
    one = [row for row in rows if row["data_set"] == 0]
    assert all(row["half_width"] is None for row in susceptibility.paired(one))
    assert all(row["half_width_nn_top5"] is None for row in susceptibility.rows(one))


def test_the_difference_of_the_conventions_is_tested_within_sets() -> None:
    """Oracles: scipy's one-sample test of (last − first) on raw less that on scaled weights; Holm by statsmodels."""
    from statsmodels.stats.multitest import multipletests

    rng = np.random.default_rng(1)
    shared = rng.normal(0, 0.3, 8)
    values = {(w, step): 1 + shared + rng.normal(0, 0.05, 8) for w in ("margin", "raw") for step in (10, 90)}
    values["raw", 90] += 0.2
    rows = []
    for k in range(8):
        for (weights, step), of in values.items():
            rows += [
                _heldout_row(k, step=step),
                {**_attack_row(k, float(of[k]), step=step), "weights": weights},
            ]
    found = susceptibility.paired(rows)
    (row,) = (r for r in found if r["contrast"] == "conventions" and r["measure"] == "nn_top5_margin")
    raw, scaled = (values[w, 90] - values[w, 10] for w in ("raw", "margin"))
    expected: Any = ttest_1samp(raw - scaled, 0)
    interval = expected.confidence_interval(0.95)
    assert row["p"] == pytest.approx(expected.pvalue)
    assert row["difference"] + row["half_width"] == pytest.approx(interval.high)
    assert (row["first"], row["second"]) == (pytest.approx(raw.mean()), pytest.approx(scaled.mean()))
    assert row["leaks_more"] == int((raw < scaled).sum())
    training = [r for r in found if r["contrast"] == "training"]
    assert len(training) == 4
    tested = [r for r in training if r["p"] is not None]
    # Four tests of one contrast, whether or not each can be computed.
    padded = [r["p"] for r in tested] + [1.0] * (4 - len(tested))
    adjusted: Any = multipletests(padded, method="holm")[1]
    holm = adjusted[: len(tested)]
    assert [r["p_holm"] for r in tested] == [pytest.approx(p) for p in holm]
    # Only one scale of the weights: no such contrast.
    only = susceptibility.paired([r for r in rows if r["kind"] == "heldout" or r["weights"] == "raw"])
    assert {r["contrast"] for r in only} == {"training"}


def test_believed_offsets_are_compared_with_the_first_within_sets() -> None:
    """Oracles: scipy's paired test, and Holm by statsmodels over all offsets and measures."""
    from statsmodels.stats.multitest import multipletests

    rng = np.random.default_rng(2)
    shared = rng.normal(0, 0.3, 8)
    values = {offset: 1 + shared + rng.normal(0, 0.05, 8) for offset in (1.0, 0.5, 0.0)}
    values[0.0] += 0.4
    rows = []
    for k in range(8):
        rows.append(_heldout_row(k, offset=None))
        rows += [_attack_row(k, float(of[k]), float(of[k]) / 4, offset=o) for o, of in values.items()]
    found = susceptibility.paired(rows)
    assert [row["pair"] for row in found] == ["gd: offset 0.5 − 1"] * 2 + ["gd: offset 0 − 1"] * 2
    assert {row["contrast"] for row in found} == {"offsets"}
    distance = found[2]
    expected: Any = ttest_rel(values[0.0], values[1.0])
    assert distance["measure"] == "nn_top5_margin"
    assert distance["p"] == pytest.approx(expected.pvalue)
    assert distance["difference"] - distance["half_width"] == pytest.approx(
        expected.confidence_interval(0.95).low
    )
    assert distance["leaks_more"] == int((values[0.0] < values[1.0]).sum())
    adjusted: Any = multipletests([row["p"] for row in found], method="holm")[1]
    assert [row["p_holm"] for row in found] == [pytest.approx(p) for p in adjusted]
    # Each belief is a row of its own: averaged, they would hide the difference.
    assert [row["offset"] for row in susceptibility.rows(rows)] == [1.0, 0.5, 0.0]


def test_duplicates_are_counted_next_to_chance() -> None:
    nowhere: dict[str, Any] = {"objective": None, "weights": None, "radius": None, "offset": None}
    rows = []
    for k in range(2):
        hits = {"hits_10": 0.4 + 0.1 * k, "hits_25": 1.0, "hits_50": 1.0}
        rows += [_attack_row(k, 1.0, **hits), _attack_row(k, 1.0, **{"kind": "heldout", **hits, **nowhere})]
    rows.append({**rows[1], "candidates": 40})
    attack, heldout = susceptibility.duplicate_rows(rows)
    assert (attack["kind"], heldout["kind"]) == ("attack", "heldout")
    assert attack["hits_10"] == pytest.approx(0.45)
    assert attack["half_width_hits_10"] == pytest.approx(12.706 * 0.05, rel=1e-3)
    assert attack["data_sets"] == heldout["data_sets"] == 2
