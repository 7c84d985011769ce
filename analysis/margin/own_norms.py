"""Multiclass linear classifiers under normalized steepest descent: each descent maximizes the margin of its own norm.

Cross-entropy of W X from W = 0. The direction of steepest descent in a norm is the gradient's dual: G/‖G‖_F for the
Frobenius norm, sign G for the max norm, the polar factor of G for the spectral norm (Fan, Schmidt and
Thrampoulidis, arXiv 2502.04664).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from analysis.margin.matrices import polar

Floats = NDArray[np.float64]
DESCENTS = {"l2": "frobenius", "sign": "max", "spectral": "spectral"}
"""descent → the norm that it is steepest in."""
NORMS = ("frobenius", "max", "spectral")
STEP = 0.5
SIGN_SHARE = 0.3
"""Sign steps are longer in every other norm, and settle later at equal step size."""


def functional_margins(scores: Floats, labels: NDArray[np.int64]) -> Floats:
    """(n,): score of the label less the largest other one; (n, c) scores."""
    rows = np.arange(len(labels))
    others = scores.copy()
    others[rows, labels] = -np.inf
    return scores[rows, labels] - others.max(1)


def norms(weight: Floats) -> dict[str, float]:
    """The three norms of a matrix."""
    return {
        "frobenius": float(np.linalg.norm(weight)),
        "max": float(np.abs(weight).max()),
        "spectral": float(np.linalg.norm(weight, 2)),
    }


def descend(features: Floats, labels: NDArray[np.int64], classes: int, descent: str, steps: int) -> Floats:
    """W (classes, d) after normalized steepest descent with step 0.5/√t (0.15/√t for sign).

    Args:
        features: (n, d).
        labels: (n,), 0 … classes - 1.
        descent: "l2", "sign" or "spectral".
        steps: how many.
    """
    weight = np.zeros((classes, features.shape[1]))
    targets = np.eye(classes)[labels]
    for t in range(1, steps + 1):
        scores = features @ weight.T
        # p_label - 1 is minus the sum of the others' p: 1 - p would round to 0 where the loss is small.
        others = np.where(targets > 0.0, -np.inf, scores - (scores * targets).sum(1, keepdims=True))
        log_total = np.logaddexp(0.0, np.logaddexp.reduce(others, axis=1))[:, None]
        log_pull = others - log_total
        # A common factor changes no direction, and keeps the smallest loss from underflowing.
        pull = -np.exp(log_pull - log_pull.max())
        pull += targets * -pull.sum(1, keepdims=True)
        gradient = pull.T @ features
        size = STEP / np.sqrt(t)
        if descent == "l2":
            direction = gradient / np.linalg.norm(gradient)
        elif descent == "sign":
            direction, size = np.sign(gradient), size * SIGN_SHARE
        else:
            direction = polar(gradient[None])[0]
        weight += size * direction
    return weight


def table(
    weights: dict[str, Floats], features: Floats, labels: NDArray[np.int64]
) -> dict[str, dict[str, float]]:
    """name → norm → smallest functional margin over that norm of W."""
    found = {}
    for name, weight in weights.items():
        smallest = float(functional_margins(features @ weight.T, labels).min())
        found[name] = {norm: smallest / size for norm, size in norms(weight).items()}
    return found


def wins_in_own_norm(found: dict[str, dict[str, float]], names: Sequence[str] = tuple(DESCENTS)) -> bool:
    """Whether in every norm's column the descent of that norm has the largest margin, strictly."""
    for name in names:
        column = {other: found[other][DESCENTS[name]] for other in names}
        if any(column[other] >= column[name] for other in names if other != name):
            return False
    return True
