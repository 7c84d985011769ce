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

from analysis.comparison.statistics import interval
from analysis.memorization.windows import Rows, greedy_continuations

Floats = NDArray[np.float64]


def extract(model: nn.Module, rows: Rows, prefix: int, length: int) -> Floats:
    """Return the share of the ``length`` tokens behind the prefix that greedy decoding gives right, by row."""
    continuations = greedy_continuations(model, rows.ids[:, :prefix], length)
    true = np.concatenate([rows.ids, rows.labels[:, -1:]], axis=1)[:, prefix : prefix + length]
    return (continuations == true).mean(1)


def describe(training: Floats, validation: Floats, prefix: int, length: int) -> dict[str, Any]:
    """Return shares of right tokens and of whole continuations in both splits, and their difference.

    Intervals are 95 %: of t over rows (Welch's for the difference), and Wilson's for whole continuations.
    """
    test = stats.ttest_ind(training, validation, equal_var=False)
    varies = np.ptp(training) > 0 or np.ptp(validation) > 0
    difference = float(training.mean() - validation.mean())
    ends = test.confidence_interval(0.95) if varies else (difference, difference)
    return {
        "prefix": prefix,
        "continuation": length,
        "train": _split(training),
        "validation": _split(validation),
        "difference": {"tokens_right": difference, "low": float(ends[0]), "high": float(ends[1])},
    }


def _split(shares: Floats) -> dict[str, Any]:
    found = interval(shares)
    whole = int((shares == 1.0).sum())
    ends = stats.binomtest(whole, len(shares)).proportion_ci(method="wilson")
    return {
        "rows": len(shares),
        "tokens_right": found.mean,
        "low": max(0.0, found.mean - found.half_width),
        "high": min(1.0, found.mean + found.half_width),
        "whole": whole / len(shares),
        "whole_low": float(ends.low),
        "whole_high": float(ends.high),
    }
