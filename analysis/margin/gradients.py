"""Gradients of many toy nets at once, raw or scale-free."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from analysis.margin.net import Floats, Nets, Problem, log_slopes, preactivations


class Ascent(NamedTuple):
    """What raises the margins y·f: Σ_i c_i·y_i·∇f(x_i).

    Attributes:
        hidden: (k, d + 1, R).
        output: (k, R), or None where v is fixed.
        log_size: (R,) ln Σ|ℓ'| of the mean loss: the weights c are divided by its exponential where the
            gradient is scale-free. None for raw gradients.
    """

    hidden: Floats
    output: Floats | None
    log_size: Floats | None


def ascent(net: Nets, problem: Problem, *, scale_free: bool) -> Ascent:
    """The negative gradient of the loss, or its direction with weights that sum to 1 (softmax of ln |ℓ'|).

    The second form is the gradient of ln L up to a factor that is 1 for the exponential loss. It keeps the
    direction where every ℓ' underflows. relu' at 0 is 0.
    """
    points = problem.points
    pre = preactivations(net, points)
    active = pre > 0.0
    value = np.where(active, pre, 0.0)
    y = points.y.astype(pre.dtype)[:, None]
    z = y * (net.output[:, None] * value).sum(0)
    slopes = log_slopes(z, problem.loss)
    size = None
    if scale_free:
        top = slopes.max(0)
        weights = np.exp(slopes - top)
        total = weights.sum(0)
        weights /= total
        size = top + np.log(total / len(z))
    else:
        weights = np.exp(slopes)
        if problem.reduction == "mean":
            weights /= len(z)
    pull = weights * y
    output = (pull * value).sum(1) if problem.train_output else None
    return Ascent(_hidden(net, pull, active, points.x.astype(pre.dtype)), output, size)


def _hidden(net: Nets, pull: Floats, active: NDArray[np.bool_], x: Floats) -> Floats:
    """(k, d + 1, R): v_j Σ_i pull_i [active] (x_i, 1)."""
    share = np.where(active, net.output[:, None] * pull, 0.0)
    gradient = np.empty_like(net.hidden)
    gradient[:, -1] = share.sum(1)
    if x.shape[1] == 1:
        gradient[:, 0] = (share * x[None]).sum(1)
    else:
        gradient[:, :-1] = np.einsum("knr,nd->kdr", share, x)
    return gradient
