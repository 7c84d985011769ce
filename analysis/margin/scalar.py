"""One run of two neurons on two points of the line in plain Python numbers: the fastest form of so small a net.

A numpy operation on six numbers costs as much as twenty multiplications here, so long runs of one net take
this way: a million steps of gradient descent in about two seconds. Every rule is the one of `rules`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from analysis.margin import scalar_matrices
from analysis.margin.net import Nets, Problem

Numbers = list[float]
Gradient = Callable[
    [float, float, float, float, float, float], tuple[float, float, float, float, float, float]
]
Advance = Callable[[Numbers, int, int], Numbers]
RULES = ("gd", "ngd", "sign", "adamw")
MATRIX_RULES = ("spectral", "muon", "sumo", "galore")


def fits(net: Nets, problem: Problem, kind: str, weight_decay: float) -> bool:
    """Whether this module computes it: one fp64 run, k = 2, d = 1, two points."""
    shape = net.hidden.shape == (2, 2, 1) and net.hidden.dtype == np.float64 and len(problem.points.y) == 2
    known = kind in RULES or (kind in MATRIX_RULES and not problem.train_output)
    return shape and known and weight_decay == 0.0


def numbers(net: Nets) -> Numbers:
    """[w1, b1, w2, b2, v1, v2]."""
    return [float(n) for n in (*net.hidden[..., 0].ravel(), *net.output[:, 0])]


def net_of(values: Numbers) -> Nets:
    """Inverse of `numbers`."""
    return Nets(np.array(values[:4]).reshape(2, 2, 1), np.array(values[4:]).reshape(2, 1))


def advance(
    kind: str, problem: Problem, lr: float, options: Mapping[str, Any], *, scale_free: bool
) -> Advance:
    """A function (values, first, last) → values after the steps first … last - 1; it keeps optimizer state."""
    gradient = _gradient(problem, scale_free=scale_free)
    trains = problem.train_output
    if kind == "gd":
        return _descent(gradient, lr)
    if kind == "ngd":
        return _normalized(gradient, lr)
    if kind == "sign":
        return _sign(gradient, lr)
    if kind in MATRIX_RULES:
        return _matrix(gradient, lr, scalar_matrices.update(kind, options))
    return _adam(gradient, lr, options["betas"], options["eps"], trains=trains)


def _gradient(problem: Problem, *, scale_free: bool) -> Gradient:
    """(w1, b1, w2, b2, v1, v2) → what raises the margins, by component; 0 for fixed v."""
    (x1,), (x2,) = problem.points.x.tolist()
    y1, y2 = problem.points.y.tolist()
    weigh = _weights(problem, scale_free=scale_free)
    trains = problem.train_output

    def gradient(
        w1: float, b1: float, w2: float, b2: float, v1: float, v2: float
    ) -> tuple[float, float, float, float, float, float]:
        a11, a12 = w1 * x1 + b1, w1 * x2 + b1
        a21, a22 = w2 * x1 + b2, w2 * x2 + b2
        if a11 <= 0.0:
            a11 = 0.0
        if a12 <= 0.0:
            a12 = 0.0
        if a21 <= 0.0:
            a21 = 0.0
        if a22 <= 0.0:
            a22 = 0.0
        c1, c2 = weigh(y1 * (v1 * a11 + v2 * a21), y2 * (v1 * a12 + v2 * a22))
        c1 *= y1
        c2 *= y2
        g11 = c1 if a11 else 0.0
        g12 = c2 if a12 else 0.0
        g21 = c1 if a21 else 0.0
        g22 = c2 if a22 else 0.0
        g1, h1 = v1 * (g11 * x1 + g12 * x2), v1 * (g11 + g12)
        g2, h2 = v2 * (g21 * x1 + g22 * x2), v2 * (g21 + g22)
        if trains:
            return g1, h1, g2, h2, c1 * a11 + c2 * a12, c1 * a21 + c2 * a22
        return g1, h1, g2, h2, 0.0, 0.0

    return gradient


def _weights(problem: Problem, *, scale_free: bool) -> Callable[[float, float], tuple[float, float]]:
    """(z1, z2) → weights of the two points: |ℓ'|/n, or the softmax of ln |ℓ'|."""
    exp, log1p = math.exp, math.log1p
    share = 0.5 if problem.reduction == "mean" else 1.0
    is_exp = problem.loss == "exp"

    def raw(z1: float, z2: float) -> tuple[float, float]:
        return share * exp(-z1), share * exp(-z2)

    def slope(z: float) -> float:
        """ln σ(-z)."""
        return -log1p(exp(z)) if z < 0.0 else -z - log1p(exp(-z))

    def logistic(z1: float, z2: float) -> tuple[float, float]:
        return share * exp(slope(z1)), share * exp(slope(z2))

    def softmax(s1: float, s2: float) -> tuple[float, float]:
        if s1 >= s2:
            ratio = exp(s2 - s1)
            return 1.0 / (1.0 + ratio), ratio / (1.0 + ratio)
        ratio = exp(s1 - s2)
        return ratio / (1.0 + ratio), 1.0 / (1.0 + ratio)

    if scale_free:
        return (
            (lambda z1, z2: softmax(-z1, -z2)) if is_exp else (lambda z1, z2: softmax(slope(z1), slope(z2)))
        )
    return raw if is_exp else logistic


def _descent(gradient: Gradient, lr: float) -> Advance:
    def run(values: Numbers, first: int, last: int) -> Numbers:
        w1, b1, w2, b2, v1, v2 = values
        for _ in range(first, last):
            g1, h1, g2, h2, o1, o2 = gradient(w1, b1, w2, b2, v1, v2)
            w1 += lr * g1
            b1 += lr * h1
            w2 += lr * g2
            b2 += lr * h2
            v1 += lr * o1
            v2 += lr * o2
        return [w1, b1, w2, b2, v1, v2]

    return run


def _normalized(gradient: Gradient, lr: float) -> Advance:
    def run(values: Numbers, first: int, last: int) -> Numbers:
        for _ in range(first, last):
            g = gradient(*values)
            norm = math.sqrt(sum(part * part for part in g))
            if norm == 0.0:
                break
            values = [value + lr * (part / norm) for value, part in zip(values, g)]
        return values

    return run


def _sign(gradient: Gradient, lr: float) -> Advance:
    def run(values: Numbers, first: int, last: int) -> Numbers:
        for _ in range(first, last):
            g = gradient(*values)
            values = [value + lr * ((part > 0.0) - (part < 0.0)) for value, part in zip(values, g)]
        return values

    return run


def _matrix(gradient: Gradient, lr: float, update: scalar_matrices.Update) -> Advance:
    def run(values: Numbers, first: int, last: int) -> Numbers:
        w1, b1, w2, b2, v1, v2 = values
        for _ in range(first, last):
            g1, h1, g2, h2, _, _ = gradient(w1, b1, w2, b2, v1, v2)
            p1, q1, p2, q2 = update((-g1, -h1, -g2, -h2))
            w1 -= lr * p1
            b1 -= lr * q1
            w2 -= lr * p2
            b2 -= lr * q2
        return [w1, b1, w2, b2, v1, v2]

    return run


def _adam(gradient: Gradient, lr: float, betas: Sequence[float], eps: float, *, trains: bool) -> Advance:
    beta1, beta2 = betas
    rest1, rest2 = 1.0 - beta1, 1.0 - beta2
    sqrt = math.sqrt
    count = 6 if trains else 4
    first_moment, second_moment = [0.0] * 6, [0.0] * 6

    def run(values: Numbers, first: int, last: int) -> Numbers:
        values = list(values)
        for t in range(first + 1, last + 1):
            g = gradient(*values)
            bias1, root2 = 1.0 - beta1**t, sqrt(1.0 - beta2**t)
            for i in range(count):
                part = -g[i]
                first_moment[i] = m = first_moment[i] + rest1 * (part - first_moment[i])
                second_moment[i] = s = beta2 * second_moment[i] + rest2 * part * part
                values[i] -= lr * ((m / bias1) / (sqrt(s) / root2 + eps))
        return values

    return run
