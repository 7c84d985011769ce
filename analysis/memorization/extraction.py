"""Verbatim extraction: the start of a row is given, and its greedy continuation compared with the row's own.

After Carlini et al., "Quantifying Memorization Across Neural Language Models" (ICLR 2023, arXiv 2202.07646): a text is
extractable with k tokens of context. Validation rows show how much of it is only predictable text.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats
from torch import nn

from analysis.memorization import clusters
from analysis.memorization.clusters import ClusteredMean, clustered_mean
from analysis.memorization.windows import Rows, greedy_continuations

Floats = NDArray[np.float64]
Ids = NDArray[np.int64]


def extract(model: nn.Module, rows: Rows, prefix: int, length: int) -> Floats:
    """Return the share of the ``length`` tokens behind the prefix that greedy decoding gives right, by row."""
    continuations = greedy_continuations(model, rows.ids[:, :prefix], length)
    true = np.concatenate([rows.ids, rows.labels[:, -1:]], axis=1)[:, prefix : prefix + length]
    return (continuations == true).mean(1)


def describe(
    training: tuple[Floats, Ids], validation: tuple[Floats, Ids], prefix: int, length: int
) -> dict[str, Any]:
    """Return shares of right tokens and of whole continuations in both splits, and their difference.

    Intervals are 95 %: of t over documents (Welch's for the difference), and Wilson's over rows for whole ones.

    Args:
        training, validation: share of right tokens of each row, and its document.
        prefix, length: as given to `extract`.
    """
    means = clustered_mean(*training), clustered_mean(*validation)
    difference, half = clusters.difference(*means)
    return {
        "prefix": prefix,
        "continuation": length,
        "train": _split(training[0], means[0]),
        "validation": _split(validation[0], means[1]),
        "difference": {
            "tokens_right": difference,
            "low": difference - half,
            "high": difference + half,
        },
    }


def _split(shares: Floats, found: ClusteredMean) -> dict[str, Any]:
    whole = int((shares == 1.0).sum())
    ends = stats.binomtest(whole, len(shares)).proportion_ci(method="wilson")
    return {
        "rows": len(shares),
        "tokens_right": found.mean,
        "documents": found.clusters,
        "low": float(np.maximum(0.0, found.mean - found.half_width)),
        "high": float(np.minimum(1.0, found.mean + found.half_width)),
        "whole": whole / len(shares),
        "whole_low": float(ends.low),
        "whole_high": float(ends.high),
    }
