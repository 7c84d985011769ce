"""Two-layer ReLU nets without output bias, many at once: outputs, loss, gradients and exact margins.

f(x) = Σ_j v_j·relu(w_j·x + b_j). Arrays have the runs last, so that a step of thousands of runs is a few operations
on long rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations, product
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
        """Return R, the number of nets."""
        return self.hidden.shape[-1]

    def one(self, run: int) -> Nets:
        """Return net number `run`, still with a runs axis."""
        return Nets(self.hidden[..., run : run + 1], self.output[..., run : run + 1])

    def select(self, mask: NDArray[np.bool_]) -> Nets:
        """Return the nets that the mask (R,) marks."""
        return Nets(self.hidden[..., mask], self.output[..., mask])

    def copy(self) -> Nets:
        """Return a copy that later steps do not change."""
        return Nets(self.hidden.copy(), self.output.copy())


@dataclass(frozen=True)
class ToyProblem:
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


def preactivations(net: Nets, points: Points) -> Floats:
    """Return w_j·x_i + b_j, (k, n, R)."""
    hidden, x = net.hidden, points.x.astype(net.hidden.dtype)
    if x.shape[1] == 1:
        return hidden[:, None, 0] * x[None, :, :] + hidden[:, None, 1]
    return np.einsum("kdr,nd->knr", hidden[:, :-1], x) + hidden[:, None, -1]


def outputs(net: Nets, points: Points) -> Floats:
    """Return f(x_i), (n, R)."""
    return (net.output[:, None] * np.maximum(preactivations(net, points), 0.0)).sum(0)


def log_loss(net: Nets, problem: ToyProblem) -> Floats:
    """Return the natural logarithm of the loss, (R,), without underflow."""
    z = problem.points.y[:, None] * outputs(net, problem.points)
    each = -z
    if problem.loss == "logistic":
        # ln ln(1 + e^-z) is -z to rounding where e^-z < eps.
        each = np.where(z > 36.0, -z, np.log(np.logaddexp(0.0, -np.minimum(z, 36.0))))
    total = np.logaddexp.reduce(each, axis=0)
    return total - np.log(len(z)) if problem.reduction == "mean" else total


def is_dead(net: Nets, problem: ToyProblem) -> NDArray[np.bool_]:
    """Return (R,): the loss is not below that of a net which leaves one point undecided; NaN counts as dead."""
    undecided = np.log(1.0 if problem.loss == "exp" else np.log(2.0))
    if problem.reduction == "mean":
        undecided -= np.log(len(problem.points.y))
    return ~(log_loss(net, problem) < undecided)


class Ascent(NamedTuple):
    """Direction that raises the margins y·f: Σ_i c_i·y_i·∇f(x_i).

    Attributes:
        hidden: (k, d + 1, R).
        output: (k, R), or None where v is fixed.
    """

    hidden: Floats
    output: Floats | None


def ascent(net: Nets, problem: ToyProblem, *, scale_free: bool) -> Ascent:
    """Return the negative gradient of the loss, or its direction with weights that sum to 1.

    The scale-free weights are the softmax of ln |ℓ'|: the gradient of ln L, up to a factor that is 1 for the
    exponential loss. They keep the direction where every ℓ' underflows. relu' at 0 is 0.
    """
    points = problem.points
    pre = preactivations(net, points)
    active = pre > 0.0
    value = np.where(active, pre, 0.0)
    y = points.y.astype(pre.dtype)[:, None]
    z = y * (net.output[:, None] * value).sum(0)
    # ln |ℓ'(z)|: -z for e^(-z), -ln(1 + e^z) for the logistic loss.
    log_slopes = -z if problem.loss == "exp" else -np.logaddexp(0.0, z)
    if scale_free:
        weights = np.exp(log_slopes - log_slopes.max(0))
        weights /= weights.sum(0)
    else:
        weights = np.exp(log_slopes)
        if problem.reduction == "mean":
            weights /= len(z)
    pull = weights * y
    output = (pull * value).sum(1) if problem.train_output else None
    return Ascent(_hidden_ascent(net, pull, active, points.x.astype(pre.dtype)), output)


def _hidden_ascent(net: Nets, pull: Floats, active: NDArray[np.bool_], x: Floats) -> Floats:
    """Return v_j Σ_i pull_i [active] (x_i, 1), (k, d + 1, R)."""
    share = np.where(active, net.output[:, None] * pull, 0.0)
    gradient = np.empty_like(net.hidden)
    gradient[:, -1] = share.sum(1)
    if x.shape[1] == 1:
        gradient[:, 0] = (share * x[None]).sum(1)
    else:
        gradient[:, :-1] = np.einsum("knr,nd->kdr", share, x)
    return gradient


class ExactMargin(NamedTuple):
    """Distance from the points to the decision region of the other label, {x : y·f(x) ≤ 0}.

    "≤", because a net with f ≡ 0 on an interval (both neurons off) decides nothing there; a search for changes of
    sign steps over such a flat zone.

    Attributes:
        value: smallest distance over the points; 0 where one is misclassified, inf without a boundary.
        boundary: where that distance is attained, as the signed coordinate along the first axis; NaN without.
        each: (n,) distance of every point.
        flat: the boundary is the end of a zone where f is exactly 0.
    """

    value: float
    boundary: float
    each: Floats
    flat: bool


def exact_margin(net: Nets, points: Points) -> ExactMargin:
    """Return the margin of a single net (R = 1): any width for d = 1, two neurons for d > 1.

    Raises:
        ValueError: more than two neurons in more than one dimension: no exact method here.
    """
    hidden = net.hidden[..., 0].astype(np.float64)
    v = net.output[..., 0].astype(np.float64)
    if points.x.shape[1] == 1:
        nearest = [_walk(hidden, v, float(x[0]), float(y)) for x, y in zip(points.x, points.y)]
    elif len(v) == 2:
        nearest = [_by_regions(hidden, v, x, float(y)) for x, y in zip(points.x, points.y)]
    else:
        raise ValueError(f"exact margins in R^{points.x.shape[1]} take two neurons, got {len(v)}")
    each = np.array([distance for distance, _ in nearest])
    closest = int(each.argmin())
    boundary = nearest[closest][1]
    flat = bool(np.isfinite(boundary)) and points.x.shape[1] == 1 and _is_flat(hidden, v, boundary)
    return ExactMargin(float(each[closest]), boundary, each, flat)


def _walk(hidden: Floats, v: Floats, x: float, y: float) -> tuple[float, float]:
    """Return (distance, place) for d = 1: outward through the sorted kinks, linear in between."""
    neurons = [(float(w), float(b), float(o)) for (w, b), o in zip(hidden, v)]

    def f(at: float) -> float:
        return y * sum(o * (w * at + b) for w, b, o in neurons if w * at + b > 0.0)

    start = f(x)
    if start <= 0.0:
        return 0.0, x
    kinks = [-b / w for w, b, _ in neurons if w != 0.0]
    best, place = np.inf, np.nan
    for way in (1.0, -1.0):
        at, here = x, start
        # On an unbounded piece only neurons that rise that way are on.
        slope = y * sum(o * w * way for w, _, o in neurons if w * way > 0.0)
        for kink in sorted((kink for kink in kinks if (kink - x) * way > 0.0), reverse=way < 0.0):
            there = f(kink)
            if there <= 0.0:
                reach = abs(at - x) + abs(kink - at) * here / (here - there)
                break
            at, here = kink, there
        else:
            reach = abs(at - x) + here / -slope if slope < 0.0 else np.inf
        if reach < best:
            best, place = reach, x + way * reach
    return float(best), float(place)


def _is_flat(hidden: Floats, v: Floats, place: float) -> bool:
    """Return True if no neuron is on right next to a boundary, on one of its sides."""
    near = 1e-9 * max(1.0, abs(place))
    return any(
        not ((hidden[:, 0] * at + hidden[:, 1]) > 0.0)[v != 0.0].any() for at in (place - near, place + near)
    )


def _by_regions(hidden: Floats, v: Floats, x: Floats, y: float) -> tuple[float, float]:
    """Return (distance, first coordinate) in R^d for two neurons.

    In each of the four activation regions f is affine, and the nearest point with y·f ≤ 0 is the projection onto
    one to three hyperplanes.
    """
    w, b = hidden[:, :-1], hidden[:, -1]
    on = w @ x + b > 0.0
    if y * float((v * (w @ x + b))[on].sum()) <= 0.0:
        return 0.0, float(x[0])
    best, place = np.inf, np.nan
    for pattern in product((False, True), repeat=2):
        active = np.array(pattern)
        sides = np.where(active, -1.0, 1.0)
        # Rows A z ≤ r: the region's two sides, and y·f(z) ≤ 0 for the affine f of the region.
        rows = np.vstack([sides[:, None] * w, y * (v * active) @ w])
        bounds = np.append(-sides * b, -y * float((v * active) @ b))
        z = _nearest(x, rows, bounds)
        if z is not None and (reach := float(np.linalg.norm(z - x))) < best:
            best, place = reach, float(z[0])
    return best, place


def _nearest(x: Floats, rows: Floats, bounds: Floats) -> Floats | None:
    """Return argmin ‖z - x‖ with rows·z ≤ bounds, by trying every active set; None if there is no such z."""
    size = np.linalg.norm(rows, axis=1)
    slack = 1e-12 * (1.0 + np.abs(bounds) + size * np.linalg.norm(x))
    best: Floats | None = None
    for count in range(len(rows) + 1):
        for active in combinations(range(len(rows)), count):
            pick = list(active)
            z = x.copy()
            if pick:
                z = x - np.linalg.lstsq(rows[pick], rows[pick] @ x - bounds[pick], rcond=None)[0]
            is_in = bool((rows @ z <= bounds + slack).all())
            if is_in and (best is None or np.linalg.norm(z - x) < np.linalg.norm(best - x)):
                best = z
    return best
