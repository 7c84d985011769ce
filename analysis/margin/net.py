"""Two-layer ReLU nets without output bias, many at once: f(x) = Σ_j v_j·relu(w_j·x + b_j).

Arrays have the runs last, so that a step of thousands of runs is a few operations on long rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from analysis.margin.points import Points

Floats = NDArray[np.floating]


class Nets(NamedTuple):
    """R nets of k neurons on R^d.

    Attributes:
        hidden: (k, d + 1, R), the matrix [w | b] of each.
        output: (k, R), the weights v.
    """

    hidden: Floats
    output: Floats

    @property
    def runs(self) -> int:
        """R."""
        return self.hidden.shape[-1]

    def one(self, run: int) -> Nets:
        """One of them, still with a runs axis."""
        return Nets(self.hidden[..., run : run + 1], self.output[..., run : run + 1])

    def chosen(self, mask: NDArray[np.bool_]) -> Nets:
        """Those that the mask (R,) marks."""
        return Nets(self.hidden[..., mask], self.output[..., mask])

    def copy(self) -> Nets:
        """A copy that later steps do not change."""
        return Nets(self.hidden.copy(), self.output.copy())


@dataclass(frozen=True)
class Problem:
    """What is minimized.

    Attributes:
        points: (n, d).
        loss: "exp" e^(-z) or "logistic" ln(1 + e^(-z)), z = y·f(x).
        reduction: "mean" or "sum" over points.
        train_output: v is trained, too.
    """

    points: Points
    loss: str = "exp"
    reduction: str = "mean"
    train_output: bool = False

    @property
    def time_per_lr(self) -> float:
        """τ/(lr·t): flow time is that of the mean loss."""
        return 1.0 if self.reduction == "mean" else float(len(self.points.y))


def nets(w: object, b: object, v: object, dtype: type = np.float64) -> Nets:
    """One net from w (k,) or (k, d), b (k,) and v (k,)."""
    weights = np.asarray(w, dtype=dtype)
    weights = weights[:, None] if weights.ndim == 1 else weights
    hidden = np.concatenate([weights, np.asarray(b, dtype=dtype)[:, None]], axis=1)
    return Nets(hidden[..., None], np.asarray(v, dtype=dtype)[:, None])


def preactivations(net: Nets, points: Points) -> Floats:
    """(k, n, R): w_j·x_i + b_j."""
    hidden, x = net.hidden, points.x.astype(net.hidden.dtype)
    if x.shape[1] == 1:
        return hidden[:, None, 0] * x[None, :, :] + hidden[:, None, 1]
    return np.einsum("kdr,nd->knr", hidden[:, :-1], x) + hidden[:, None, -1]


def outputs(net: Nets, points: Points) -> Floats:
    """(n, R): f(x_i)."""
    return (net.output[:, None] * np.maximum(preactivations(net, points), 0.0)).sum(0)


def log_loss(net: Nets, problem: Problem) -> Floats:
    """(R,) natural logarithm of the loss, without underflow."""
    z = problem.points.y[:, None] * outputs(net, problem.points)
    each = -z
    if problem.loss == "logistic":
        # ln ln(1 + e^-z) is -z to rounding where e^-z < eps.
        each = np.where(z > 36.0, -z, np.log(np.logaddexp(0.0, -np.minimum(z, 36.0))))
    total = np.logaddexp.reduce(each, axis=0)
    return total - np.log(len(z)) if problem.reduction == "mean" else total


def log_slopes(z: Floats, loss: str) -> Floats:
    """ln |ℓ'(z)|: -z, or -ln(1 + e^z)."""
    return -z if loss == "exp" else -np.logaddexp(0.0, z)
