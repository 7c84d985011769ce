"""Exact distance from points to the decision region of the other label, {x : y·f(x) ≤ 0}.

"≤", because a net with f ≡ 0 on an interval (both neurons off) decides nothing there; a search for changes of
sign steps over such a flat zone.
"""

from __future__ import annotations

from itertools import combinations, product
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from analysis.margin.net import Nets
from analysis.margin.points import Points

Floats = NDArray[np.float64]


class Margin(NamedTuple):
    """Margin of one net.

    Attributes:
        value: smallest distance over the points; 0 where one is misclassified, inf without a boundary.
        boundary: where that distance is attained, as the signed coordinate along the first axis; NaN without.
        each: (n,) distance of every point.
        flat: the nearest decided-otherwise point lies in a zone where f is exactly 0.
    """

    value: float
    boundary: float
    each: Floats
    flat: bool


def margin(net: Nets, points: Points) -> Margin:
    """Margin of a single net (R = 1): any width for d = 1, two neurons for d > 1.

    Raises:
        ValueError: more than two neurons in more than one dimension: no exact method here.
    """
    hidden = net.hidden[..., 0].astype(np.float64)
    v = net.output[..., 0].astype(np.float64)
    if points.x.shape[1] == 1:
        found = [_walk(hidden, v, float(x[0]), float(y)) for x, y in zip(points.x, points.y)]
    elif len(v) == 2:
        found = [_by_regions(hidden, v, x, float(y)) for x, y in zip(points.x, points.y)]
    else:
        raise ValueError(f"exact margins in R^{points.x.shape[1]} take two neurons, got {len(v)}")
    each = np.array([distance for distance, _ in found])
    nearest = int(each.argmin())
    boundary = found[nearest][1]
    flat = bool(np.isfinite(boundary)) and points.x.shape[1] == 1 and _is_flat(hidden, v, boundary)
    return Margin(float(each[nearest]), boundary, each, flat)


def _walk(hidden: Floats, v: Floats, x: float, y: float) -> tuple[float, float]:
    """(distance, place) for d = 1: outward through the sorted kinks, linear in between."""
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
    """Whether no neuron is on just beside a boundary, on one of its sides."""
    near = 1e-9 * max(1.0, abs(place))
    return any(
        not ((hidden[:, 0] * at + hidden[:, 1]) > 0.0)[v != 0.0].any() for at in (place - near, place + near)
    )


def _by_regions(hidden: Floats, v: Floats, x: Floats, y: float) -> tuple[float, float]:
    """(distance, first coordinate) in R^d: in each of the four activation regions f is affine, and the nearest
    point with y·f ≤ 0 is the projection onto one to three hyperplanes."""
    w, b = hidden[:, :-1], hidden[:, -1]
    on = w @ x + b > 0.0
    if y * float((v * (w @ x + b))[on].sum()) <= 0.0:
        return 0.0, float(x[0])
    best, place = np.inf, np.nan
    for pattern in product((False, True), repeat=2):
        chosen = np.array(pattern)
        sides = np.where(chosen, -1.0, 1.0)
        # Rows A z ≤ r: the region's two sides, and y·f(z) ≤ 0 for the affine f of the region.
        rows = np.vstack([sides[:, None] * w, y * (v * chosen) @ w])
        bounds = np.append(-sides * b, -y * float((v * chosen) @ b))
        found = _nearest(x, rows, bounds)
        if found is not None and (reach := float(np.linalg.norm(found - x))) < best:
            best, place = reach, float(found[0])
    return best, place


def _nearest(x: Floats, rows: Floats, bounds: Floats) -> Floats | None:
    """argmin ‖z - x‖ with rows·z ≤ bounds, by trying every active set; None if there is no such z."""
    size = np.linalg.norm(rows, axis=1)
    slack = 1e-12 * (1.0 + np.abs(bounds) + size * np.linalg.norm(x))
    best: Floats | None = None
    for count in range(len(rows) + 1):
        for active in combinations(range(len(rows)), count):
            pick = list(active)
            z = x.copy()
            if pick:
                move = np.linalg.lstsq(rows[pick], rows[pick] @ x - bounds[pick], rcond=None)[0]
                z = x - move
            is_in = bool((rows @ z <= bounds + slack).all())
            if is_in and (best is None or np.linalg.norm(z - x) < np.linalg.norm(best - x)):
                best = z
    return best
