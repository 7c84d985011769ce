"""Metrics of tasks on resampled examples: thousands of resamples of one run at once, in numpy.

A resample of N examples is a row of counts: how often each example was drawn. Every metric is a function of weighted
sums, so that all resamples are one matrix product. `harness.tasks.metrics.score` on the drawn examples is the same
number (tests compare them), an example at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

RESAMPLES = 2000
"""The standard error of a bootstrap standard deviation from so many resamples is 1.6 %."""
SEED = 20170612
"""Of the resamples: a report is the same each time it is made."""
CHUNK = 4_000_000
"""Most counts that are held at once."""


def resample(examples: int, resamples: int = RESAMPLES, seed: int = SEED) -> Iterator[Floats]:
    """Yield counts of shape (some resamples, examples), float64; each row sums to ``examples``."""
    rng = np.random.default_rng(seed)
    most = max(1, CHUNK // examples)
    for start in range(0, resamples, most):
        size = min(most, resamples - start)
        drawn = rng.integers(0, examples, (size, examples)) + examples * np.arange(size)[:, None]
        yield np.bincount(drawn.ravel(), minlength=size * examples).reshape(size, examples).astype(float)


def share(counts: Floats, correct: Floats) -> Floats:
    """Return the share of right examples in each resample; ``correct`` has shape (examples, …)."""
    return counts @ correct / counts.sum(-1).reshape(-1, *[1] * (correct.ndim - 1))


def resampled_score(
    name: str,
    counts: Floats,
    references: Sequence[str],
    predictions: Sequence[str],
    labels: Sequence[str] | None,
) -> Floats:
    """Return a metric of one run in each resample, shape (resamples,).

    Values that a resample leaves undefined are 0, as in `harness.tasks.metrics.score`; there the references of a
    resample may be constant too.

    Args:
        name: key of `harness.tasks.metrics.METRICS`; not of a mean over examples, for which `share` is faster.
        counts: shape (resamples, examples).
        references: one per example.
        predictions: likewise.
        labels: classes in order, for F1 of two classes.
    """
    if name in ("pearson", "spearman"):
        x, y = (np.array([float(value) for value in words]) for words in (references, predictions))
        return _correlation(counts, *(_ranks(counts, x), _ranks(counts, y)) if name == "spearman" else (x, y))
    classes = sorted({*references, *predictions}) if labels is None else list(labels)
    place = {word: index for index, word in enumerate(dict.fromkeys([*classes, *references, *predictions]))}
    truth, guess = (np.array([place[word] for word in words]) for words in (references, predictions))
    table = _confusion(counts, truth, guess, len(place))
    if name == "matthews":
        return _matthews(table)
    right, predicted, present = table.diagonal(0, 1, 2), table.sum(1), table.sum(2)
    f1 = _ratio(2 * right, predicted + present)
    if len(classes) == 2:
        return f1[:, 1]
    occurs = predicted + present > 0
    return _ratio((f1 * occurs).sum(-1), occurs.sum(-1))


def _confusion(counts: Floats, truth: NDArray[np.int64], guess: NDArray[np.int64], classes: int) -> Floats:
    """Return the counts by reference and prediction, shape (resamples, classes, classes)."""
    cell = truth * classes + guess
    occupied, places = np.unique(cell, return_inverse=True)
    sums = counts @ (places[:, None] == np.arange(len(occupied))).astype(float)
    table = np.zeros((len(counts), classes * classes))
    table[:, occupied] = sums
    return table.reshape(-1, classes, classes)


def _matthews(table: Floats) -> Floats:
    """Return the correlation of several classes (Gorodkin 2004), which is Matthews' for two."""
    right, total = np.trace(table, axis1=1, axis2=2), table.sum((1, 2))
    predicted, present = table.sum(1), table.sum(2)
    covariance = right * total - (predicted * present).sum(-1)
    spread = (total**2 - (predicted**2).sum(-1)) * (total**2 - (present**2).sum(-1))
    return _ratio(covariance, np.sqrt(spread))


def _correlation(counts: Floats, x: Floats, y: Floats) -> Floats:
    """Return the weighted Pearson correlation; ``x`` and ``y`` have shape (examples,) or that of ``counts``."""
    total = counts.sum(-1, keepdims=True)
    rounding = [8 * np.finfo(float).eps * np.abs(v).max() for v in (x, y)]
    # Centred first: the difference of two large sums would lose the digits of a small spread.
    x, y = (v - (counts * v).sum(-1, keepdims=True) / total for v in (x, y))
    product, xx, yy = ((counts * a * b).sum(-1) for a, b in ((x, y), (x, x), (y, y)))
    varies = (xx > total[:, 0] * rounding[0] ** 2) & (yy > total[:, 0] * rounding[1] ** 2)
    return np.where(varies, _ratio(product, np.sqrt(xx * yy)), 0.0)


def _ranks(counts: Floats, values: Floats) -> Floats:
    """Return the mean ranks (ties share one) of the drawn examples, shape of ``counts``."""
    _, places = np.unique(values, return_inverse=True)
    order = np.argsort(places, kind="stable")
    starts = np.flatnonzero(np.diff(places[order], prepend=-1))
    ties = np.add.reduceat(counts[:, order], starts, axis=1)
    ranks = np.cumsum(ties, axis=1) - ties + (ties + 1) / 2
    return ranks[:, places]


def _ratio(above: Floats, below: Floats) -> Floats:
    """Return above/below, 0 where nothing is below."""
    return np.divide(above, below, out=np.zeros(np.broadcast(above, below).shape), where=below > 0)
