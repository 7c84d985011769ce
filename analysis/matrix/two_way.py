"""Two factors and their interaction: variance, effects, and the contrast of matched pairs. float64 throughout.

A value belongs to a pretraining optimizer p, a fine-tuning optimizer f and a seed s. The model that p pretrained with
seed s is fine-tuned by every f, so that its own quality is common to a whole row of cells:

    y[p, f, s] = mean + P[p] + F[f] + PF[p, f] + model[p, s] + error[p, f, s]

Hence P is tested against the models, F and PF against the error (a split-plot analysis: Montgomery, *Design and
Analysis of Experiments*, ch. 14). Effects of a model, and of a seed on a fine-tuning optimizer, cancel in the contrast.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from analysis.comparison.resampling import RESAMPLES, resample
from analysis.comparison.statistics import Interval, interval

Floats = NDArray[np.float64]

SEED = 20250530
"""Of the resamples: a report is the same each time it is made."""


@dataclass(frozen=True)
class VarianceSource:
    """A row of the analysis of variance.

    Attributes:
        name: pretraining, fine-tuning, interaction, models, error.
        squares: sum of squares.
        df: degrees of freedom.
        f: of the test; NaN where nothing is tested.
        p: its p-value; NaN likewise.
    """

    name: str
    squares: float
    df: int
    f: float = np.nan
    p: float = np.nan

    @property
    def mean_square(self) -> float:
        """Sum of squares per degree of freedom; NaN without any."""
        return self.squares / self.df if self.df else np.nan


def variance(values: Floats) -> list[VarianceSource]:
    """Analyse the variance of a complete table.

    Args:
        values: shape (P, F, S), finite; P and F are at least 2. With S = 1 nothing can be tested.

    Returns:
        Pretraining, fine-tuning, interaction, models, error.
    """
    rows, columns, seeds = values.shape
    grand = values.mean()
    of_row, of_column = values.mean((1, 2)) - grand, values.mean((0, 2)) - grand
    of_pair = interactions(values.mean(2))
    of_model = values.mean(1) - values.mean((1, 2))[:, None]
    total = ((values - grand) ** 2).sum()
    squares = {
        "pretraining": columns * seeds * (of_row**2).sum(),
        "fine-tuning": rows * seeds * (of_column**2).sum(),
        "interaction": seeds * (of_pair**2).sum(),
        "models": columns * (of_model**2).sum(),
    }
    squares["error"] = max(0.0, total - sum(squares.values()))
    freedom = {
        "pretraining": rows - 1,
        "fine-tuning": columns - 1,
        "interaction": (rows - 1) * (columns - 1),
        "models": rows * (seeds - 1),
        "error": rows * (columns - 1) * (seeds - 1),
    }
    plain = {name: VarianceSource(name, float(squares[name]), freedom[name]) for name in squares}
    against = {"pretraining": "models", "fine-tuning": "error", "interaction": "error"}
    return [
        _tested(source, plain[against[name]]) if name in against else source for name, source in plain.items()
    ]


def _tested(source: VarianceSource, against: VarianceSource) -> VarianceSource:
    if not against.df or against.squares <= 0:
        return source
    f = source.mean_square / against.mean_square
    return VarianceSource(
        source.name, source.squares, source.df, f, float(stats.f.sf(f, source.df, against.df))
    )


def interactions(means: Floats) -> Floats:
    """Return what two main effects leave of a table: shape (P, F, …) in and out; rows and columns sum to 0."""
    return (
        means
        - means.mean(1, keepdims=True)
        - means.mean(0, keepdims=True)
        + means.mean((0, 1), keepdims=True)
    )


def matching_weights(rows: list[str], columns: list[str]) -> Floats | None:
    """Return the weights of the contrast of matched pairs, shape (P, F); None where no pair matches, or all do.

    Their product with a table of means is the coefficient of "the same optimizer twice" in a regression with both main
    effects: how much a matched pair exceeds what its row and its column predict, above other pairs.
    """
    same = np.array([[float(row == column) for column in columns] for row in rows])
    free = interactions(same)
    scale = (free * same).sum()
    return free / scale if scale > 1e-12 else None


def matching(values: Floats, weights: Floats) -> Interval:
    """Return the contrast of matched pairs over seeds with its t-interval.

    Args:
        values: shape (P, F, S).
        weights: of `matching_weights`.
    """
    return interval(np.einsum("pf,pfs->s", weights, values))


def resampled_matching(values: Floats, weights: Floats, resamples: int = RESAMPLES) -> tuple[float, float]:
    """Return the 95 % percentile interval of the contrast over resampled seeds and examples.

    Seeds and examples are drawn independently of each other, because every cell has the same examples.

    Args:
        values: shape (P, F, S, N): of each example, whose mean is the metric; N = 1 where no mean is it.
        weights: of `matching_weights`.
        resamples: number of them.
    """
    contrast = np.einsum("pf,pfsn->sn", weights, values)
    means = np.concatenate(list(_resampled_means(contrast, resamples)))
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def _resampled_means(contrast: Floats, resamples: int) -> Iterator[Floats]:
    seeds, examples = contrast.shape
    # A stream of its own: seeds and examples are drawn independently.
    rng = np.random.default_rng([SEED, 1])
    for counts in resample(examples, resamples, SEED):
        of_seeds = rng.multinomial(seeds, np.full(seeds, 1 / seeds), len(counts)) / seeds
        yield ((of_seeds @ contrast) * counts).sum(1) / examples


def effects(values: Floats, axis: int) -> list[Interval]:
    """Return the main effect of each level: its mean over the other factor, minus the grand mean, over seeds.

    Args:
        values: shape (P, F, S).
        axis: 0: pretraining; 1: fine-tuning.
    """
    of_level = values.mean(1 - axis) - values.mean((0, 1))
    return [interval(level) for level in of_level]
