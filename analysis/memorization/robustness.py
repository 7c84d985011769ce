"""How far a model's predictions of held-out text are from changing: margins of its head, radii of its embeddings.

The tokens are the same for every checkpoint of a corpus: the starts of validation rows at equal distances.
`analysis.margin.robustness` defines both numbers and says what they do not certify.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from analysis.margin import robustness
from analysis.memorization.windows import Rows, spread

WINDOW, WINDOWS = 16, 32
"""Tokens of a window, and how many are measured: an attack on an embedding takes about 200 passes through the model."""


def describe(model: nn.Module, validation: Rows) -> dict[str, Any]:
    """Return the median signed head margin over tokens, and the median embedding radius over windows.

    Both are for perturbations of the l2 norm: the margin relative to the norm of the token's feature, the radius to the
    median norm of an embedding. Intervals are 95 %, over windows.

    Args:
        model: a `transformers` causal language model in evaluation mode; the attack runs in its dtype (fp32), margins
            are computed from its features in fp64.
        validation: rows of which windows are taken.
    """
    rows = validation.some(spread(len(validation.ids), WINDOWS))
    ids, labels = (torch.from_numpy(part[:, :WINDOW]) for part in (rows.ids, rows.labels))
    margins = robustness.head_margins(model, ids, labels).numpy()
    radii = robustness.embedding_radii(model, ids).numpy()
    return {
        "head_margin": _median(margins),
        "embedding_radius": _median(radii[:, None]),
        "tokens_right": float((margins > 0.0).mean()),
        "tokens": margins.size,
        "windows": len(margins),
    }


def _median(values: NDArray[np.floating]) -> dict[str, float]:
    return robustness.median_over_windows(values)._asdict()
