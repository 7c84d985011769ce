"""The analysis of variance against statsmodels, the contrast against closed forms, and errors of a null case."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from analysis.matrix import two_way

Floats = NDArray[np.float64]
NAMES = ["adamw", "muon", "sumo"]


def table(seeds: int = 4, *, match: float = 0.0, seed: int = 0, columns: int = 3) -> Floats:
    """Additive effects, a quality of each pretrained model, noise, and ``match`` on the diagonal."""
    rng = np.random.default_rng(seed)
    rows, levels = np.array([0.0, 0.3, -0.2]), np.array([0.0, -0.1, 0.25, 0.05])[:columns]
    values = rows[:, None, None] + levels[None, :, None] + rng.normal(0, 0.2, (3, 1, seeds))
    return values + match * np.eye(3, columns)[:, :, None] + rng.normal(0, 0.05, (3, columns, seeds))


@pytest.mark.parametrize(("seeds", "columns"), [(2, 3), (5, 3), (4, 4)])
def test_the_variance_is_that_of_statsmodels(seeds: int, columns: int) -> None:
    pd = pytest.importorskip("pandas")
    pytest.importorskip("statsmodels")
    from statsmodels.formula.api import ols
    from statsmodels.stats.anova import anova_lm

    values = table(seeds, match=0.1, columns=columns)
    cells = [(p, f, s, values[p, f, s]) for p, f, s in np.ndindex(*values.shape)]
    frame = pd.DataFrame(cells, columns=["p", "f", "s", "y"])
    fitted = anova_lm(ols("y ~ C(p) * C(f) + C(p):C(s)", frame).fit(), typ=1)
    ours = {source.name: source for source in two_way.variance(values)}
    theirs = {
        "pretraining": "C(p)",
        "fine-tuning": "C(f)",
        "interaction": "C(p):C(f)",
        "models": "C(p):C(s)",
        "error": "Residual",
    }
    for name, row in theirs.items():
        assert ours[name].squares == pytest.approx(fitted.loc[row, "sum_sq"], rel=1e-9)
    for name in ("fine-tuning", "interaction"):
        assert ours[name].p == pytest.approx(fitted.loc[theirs[name], "PR(>F)"], rel=1e-7)
    models = fitted.loc["C(p):C(s)"]
    tested = fitted.loc["C(p)", "mean_sq"] / (models["sum_sq"] / ours["models"].df)
    assert ours["pretraining"].f == pytest.approx(tested, rel=1e-9)


def test_the_contrast_is_the_coefficient_of_a_regression() -> None:
    values = table(3, match=0.4, columns=4)
    weights = two_way.matching_weights(NAMES, [*NAMES, "lion"])
    assert weights is not None
    design, response = [], []
    for p, f, s in np.ndindex(*values.shape):
        design.append([*np.eye(3)[p], *np.eye(4)[f][1:], float(p == f)])
        response.append(values[p, f, s])
    expected = np.linalg.lstsq(np.array(design), np.array(response), rcond=None)[0][-1]
    assert two_way.matching(values, weights).mean == pytest.approx(expected, rel=1e-9)


def test_without_noise_the_contrast_is_the_effect() -> None:
    values = np.add.outer([0.0, 0.3, -0.2], [0.1, 0.0, 0.7])[:, :, None].repeat(2, 2)
    values = values + 0.25 * np.eye(3)[:, :, None] + np.array([[1.0, -3.0]])  # a seed shifts all cells
    weights = two_way.matching_weights(NAMES, NAMES)
    assert weights is not None
    assert two_way.matching(values, weights).mean == pytest.approx(0.25, abs=1e-12)
    assert two_way.resampled_matching(values[..., None], weights) == pytest.approx((0.25, 0.25), abs=1e-12)


def test_no_contrast_where_nothing_or_everything_matches() -> None:
    assert two_way.matching_weights(["a", "b"], ["c", "d"]) is None
    assert two_way.matching_weights(["a"], ["a"]) is None


def test_main_effects_sum_to_zero_and_are_those_of_the_levels() -> None:
    values = np.add.outer([0.0, 0.3, -0.3], [0.1, -0.1])[:, :, None].repeat(3, 2)
    assert [e.mean for e in two_way.effects(values, 0)] == pytest.approx([0.0, 0.3, -0.3])
    assert [e.mean for e in two_way.effects(values, 1)] == pytest.approx([0.1, -0.1])


def test_the_test_of_an_absent_interaction_errs_as_often_as_it_says() -> None:
    """Without an interaction p is uniform: of 400 tables 5 % fall below 0.05, give or take 1.1 % (one deviation)."""
    found = np.array([two_way.variance(table(4, seed=seed))[2].p < 0.05 for seed in range(400)])
    assert 0.02 <= found.mean() <= 0.085
    weights = two_way.matching_weights(NAMES, NAMES)
    assert weights is not None
    covered = []
    for seed in range(400):
        effect = two_way.matching(table(4, seed=seed), weights)
        covered.append(abs(effect.mean) <= effect.half_width)
    assert 0.915 <= np.mean(covered) <= 0.98


def test_pretraining_is_not_tested_against_the_noise_of_fine_tuning() -> None:
    """Few models of unequal quality must not look like an effect of their optimizer."""
    rng = np.random.default_rng(1)
    false = []
    for _ in range(300):
        values = rng.normal(0, 1.0, (3, 1, 3)) + rng.normal(0, 0.01, (3, 3, 3))
        false.append(two_way.variance(values)[0].p < 0.05)
    assert np.mean(false) <= 0.1  # against the error of fine-tuning nearly all would be


def test_resampled_examples_widen_the_interval() -> None:
    rng = np.random.default_rng(2)
    correct = rng.random((3, 3, 5, 40)) < 0.6
    weights = two_way.matching_weights(NAMES, NAMES)
    assert weights is not None
    with_examples = two_way.resampled_matching(correct.astype(float), weights)
    without = two_way.resampled_matching(correct.mean(-1, keepdims=True), weights)
    assert with_examples[1] - with_examples[0] > without[1] - without[0]
    # Independent answers: the deviation of the contrast is √(Σw²·p(1 − p)/(S·N)); the drawn seeds add as much again.
    scale = np.sqrt((weights**2).sum() * 0.24 / (5 * 40))
    assert with_examples[1] - with_examples[0] == pytest.approx(2 * 1.96 * scale * np.sqrt(2), rel=0.3)
