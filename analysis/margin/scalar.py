"""One run of two neurons on two points of the line in plain Python numbers: the fastest form of so small a net.

A numpy operation on six numbers costs as much as twenty multiplications here, so `rules` take 20 to 75 times as long
for one net: a million steps of gradient descent are two seconds here and three quarters of a minute there. Every rule
is the one of `rules`, which tests hold to the optimizer classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from analysis.margin.net import Nets, ToyProblem
from analysis.margin.rules import JORDAN, update_scale

Numbers = tuple[float, float, float, float, float, float]
"""One number for each of w1, b1, w2, b2, v1, v2."""
Matrix = tuple[float, float, float, float]
"""Rows of a 2×2 matrix [w | b], one after the other."""
Gradient = Callable[[float, float, float, float, float, float], Numbers]
Update = Callable[[Numbers], Numbers]
"""Gradient → what a step subtracts from the weights, over lr."""
MatrixUpdate = Callable[[Matrix], Matrix]
Advance = Callable[[Numbers, int, int], Numbers]
"""(weights, first, last) → weights after the steps first … last - 1."""
RULES = ("gd", "ngd", "sign", "adamw")
MATRIX_RULES = ("spectral", "muon", "sumo", "galore")
EPS = 2.0**-52
TIE = 1.0 - 16.0 * EPS
LOST: Numbers = (math.nan, math.nan, math.nan, math.nan, math.nan, math.nan)
"""Weights of a run whose numbers mean nothing any more."""


def fits(net: Nets, problem: ToyProblem, kind: str, weight_decay: float) -> bool:
    """Return True if this module computes it: one fp64 run, k = 2, d = 1, two points, no weight decay."""
    is_small = net.hidden.shape == (2, 2, 1) and net.hidden.dtype == np.float64 and len(problem.points.y) == 2
    is_known = kind in RULES or (kind in MATRIX_RULES and not problem.train_output)
    return is_small and is_known and weight_decay == 0.0


def to_numbers(net: Nets) -> Numbers:
    """Return (w1, b1, w2, b2, v1, v2) of one net."""
    w1, b1, w2, b2 = net.hidden[..., 0].ravel().tolist()
    v1, v2 = net.output[:, 0].tolist()
    return w1, b1, w2, b2, v1, v2


def to_net(numbers: Numbers) -> Nets:
    """Return the net of numbers, the inverse of `to_numbers`."""
    return Nets(np.array(numbers[:4]).reshape(2, 2, 1), np.array(numbers[4:]).reshape(2, 1))


def advance(
    kind: str, problem: ToyProblem, lr: float, options: Mapping[str, Any], *, scale_free: bool
) -> Advance:
    """Return a function that takes steps and keeps the optimizer's state between its calls.

    Args:
        kind: one of `RULES` or `MATRIX_RULES`.
        problem: two points on the line.
        lr: learning rate.
        options: resolved options of the optimizer.
        scale_free: step along the gradient of ln L (`net.ascent`).
    """
    gradient = _gradient(problem, scale_free=scale_free)
    update = _update(kind, options, trains=problem.train_output)

    def take_steps(numbers: Numbers, first: int, last: int) -> Numbers:
        w1, b1, w2, b2, v1, v2 = numbers
        for _ in range(first, last):
            g1, h1, g2, h2, o1, o2 = gradient(w1, b1, w2, b2, v1, v2)
            if update is not None:
                g1, h1, g2, h2, o1, o2 = update((g1, h1, g2, h2, o1, o2))
            w1 -= lr * g1
            b1 -= lr * h1
            w2 -= lr * g2
            b2 -= lr * h2
            v1 -= lr * o1
            v2 -= lr * o2
        return w1, b1, w2, b2, v1, v2

    return take_steps


def _gradient(problem: ToyProblem, *, scale_free: bool) -> Gradient:
    """Return (w1, b1, w2, b2, v1, v2) → gradient of the loss by component; 0 for fixed v."""
    (x1,), (x2,) = problem.points.x.tolist()
    y1, y2 = problem.points.y.tolist()
    weigh = _weights(problem, scale_free=scale_free)
    trains = problem.train_output

    def gradient(w1: float, b1: float, w2: float, b2: float, v1: float, v2: float) -> Numbers:
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
        c1 *= -y1
        c2 *= -y2
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


def _weights(problem: ToyProblem, *, scale_free: bool) -> Callable[[float, float], tuple[float, float]]:
    """Return (z1, z2) → weights of the two points: |ℓ'|/n, or the softmax of ln |ℓ'|."""
    exp, log1p = math.exp, math.log1p
    share = 0.5 if problem.reduction == "mean" else 1.0

    def log_slope(z: float) -> float:
        """Return ln |ℓ'(z)| of the logistic loss, ln σ(-z)."""
        return -log1p(exp(z)) if z < 0.0 else -z - log1p(exp(-z))

    def softmax(s1: float, s2: float) -> tuple[float, float]:
        if s1 >= s2:
            ratio = exp(s2 - s1)
            return 1.0 / (1.0 + ratio), ratio / (1.0 + ratio)
        ratio = exp(s1 - s2)
        return ratio / (1.0 + ratio), 1.0 / (1.0 + ratio)

    if problem.loss == "exp":
        if scale_free:
            return lambda z1, z2: softmax(-z1, -z2)
        return lambda z1, z2: (share * exp(-z1), share * exp(-z2))
    if scale_free:
        return lambda z1, z2: softmax(log_slope(z1), log_slope(z2))
    return lambda z1, z2: (share * exp(log_slope(z1)), share * exp(log_slope(z2)))


def _update(kind: str, options: Mapping[str, Any], *, trains: bool) -> Update | None:
    """Return the rule with fresh state; None for gradient descent, which subtracts the gradient itself."""
    if kind == "gd":
        return None
    if kind == "ngd":
        return _normalized
    if kind == "sign":
        return _signs
    if kind == "adamw":
        return _adam(options["betas"], options["eps"], trains=trains)
    if kind == "spectral":
        step: MatrixUpdate = polar
    elif kind == "muon":
        step = _muon(options)
    else:
        step = _Subspace(kind, options).step
    return lambda g: (*step(g[:4]), 0.0, 0.0)


def _normalized(g: Numbers) -> Numbers:
    """Return g/‖g‖₂ over all parameters; 0 where the gradient is."""
    norm = math.sqrt(sum([part * part for part in g])) or 1.0
    a, b, c, d, e, f = g
    return a / norm, b / norm, c / norm, d / norm, e / norm, f / norm


def _signs(g: Numbers) -> Numbers:
    a, b, c, d, e, f = ((part > 0.0) - (part < 0.0) for part in g)
    return a, b, c, d, e, f


def _adam(betas: Sequence[float], eps: float, *, trains: bool) -> Update:
    """Return Adam with bias correction, M̂/(√V̂ + ε) (arXiv 1412.6980, Algorithm 1)."""
    beta1, beta2 = betas
    rest1, rest2 = 1.0 - beta1, 1.0 - beta2
    sqrt = math.sqrt
    trained = range(6 if trains else 4)
    first, second, moved = [0.0] * 6, [0.0] * 6, [0.0] * 6
    t = 0

    def update(g: Numbers) -> Numbers:
        nonlocal t
        t += 1
        bias1, root2 = 1.0 - beta1**t, sqrt(1.0 - beta2**t)
        for i in trained:
            part = g[i]
            first[i] = m = first[i] + rest1 * (part - first[i])
            second[i] = s = beta2 * second[i] + rest2 * part * part
            moved[i] = (m / bias1) / (sqrt(s) / root2 + eps)
        a, b, c, d, e, f = moved
        return a, b, c, d, e, f

    return update


def polar(m: Matrix) -> Matrix:
    """Return the exact polar factor (`rules.polar`)."""
    top = max(abs(m[0]), abs(m[1]), abs(m[2]), abs(m[3]))
    if top == 0.0:
        return m
    a, b, c, d = m[0] / top, m[1] / top, m[2] / top, m[3] / top
    determinant = a * d - b * c
    size = abs(determinant)
    squares = a * a + b * b + c * c + d * d
    sums = math.sqrt(squares + 2.0 * size)
    largest = 0.5 * (sums + math.sqrt(max(squares - 2.0 * size, 0.0)))
    if size <= 2.0 * EPS * largest * largest:
        return a / largest, b / largest, c / largest, d / largest
    if determinant > 0.0:
        return (a + d) / sums, (b - c) / sums, (c - b) / sums, (d + a) / sums
    return (a - d) / sums, (b + c) / sums, (c + b) / sums, (d - a) / sums


def newton_schulz(m: Matrix, steps: int) -> Matrix:
    """Apply Jordan's quintic (`rules.newton_schulz`)."""
    p, q, r = JORDAN
    norm = max(math.sqrt(m[0] * m[0] + m[1] * m[1] + m[2] * m[2] + m[3] * m[3]), 1e-7)
    a, b, c, d = m[0] / norm, m[1] / norm, m[2] / norm, m[3] / norm
    for _ in range(steps):
        e, f, h = a * a + b * b, a * c + b * d, c * c + d * d
        k, l, n = (q * e + r * (e * e + f * f), q * f + r * (e * f + f * h), q * h + r * (f * f + h * h))
        a, b, c, d = (
            p * a + (k * a + l * c),
            p * b + (k * b + l * d),
            p * c + (l * a + n * c),
            p * d + (l * b + n * d),
        )
    return a, b, c, d


def _muon(options: Mapping[str, Any]) -> MatrixUpdate:
    momentum = _Momentum(options, 4)
    size = update_scale(options["update_scale"], (2, 2)) * options["alpha"]
    steps = options["orthogonalizer_steps"] if options["orthogonalizer"] == "newton_schulz" else None

    def step(gradient: Matrix) -> Matrix:
        a, b, c, d = momentum(gradient)
        factor = polar((a, b, c, d)) if steps is None else newton_schulz((a, b, c, d), steps)
        return factor[0] * size, factor[1] * size, factor[2] * size, factor[3] * size

    return step


class _Momentum:
    """Gradient → what is orthogonalized (`rules.BatchedMuon.momentum`)."""

    def __init__(self, options: Mapping[str, Any], length: int) -> None:
        self.mu, self.nesterov = options["momentum"], options["nesterov"]
        self.weight = 1.0 if options["momentum_form"] == "sum" else 1.0 - self.mu
        self.moment = [0.0] * length

    def __call__(self, gradient: Sequence[float]) -> Sequence[float]:
        """Advance the moment and return the direction of the step."""
        mu, weight = self.mu, self.weight
        if self.nesterov == "stored":
            self.moment = [mu * mu * m + weight * (1.0 + mu) * g for m, g in zip(self.moment, gradient)]
            return self.moment
        self.moment = [mu * m + weight * g for m, g in zip(self.moment, gradient)]
        if self.nesterov:
            return [weight * g + mu * m for m, g in zip(self.moment, gradient)]
        return self.moment


class _Subspace:
    """SUMO and GaLore of rank 1 (`rules.BatchedSumo`, `rules.BatchedGaLore`)."""

    def __init__(self, kind: str, options: Mapping[str, Any]) -> None:
        self.options = options
        self.is_sumo = kind == "sumo"
        self.left = options["side"] == "short"  # a square matrix: from the left, or from the right
        self.basis: tuple[float, float] | None = None
        self.count = 0
        self.first, self.second = [0.0, 0.0], [0.0, 0.0]
        self.momentum = _Momentum(options, 2) if self.is_sumo else None

    def step(self, gradient: Matrix) -> Matrix:
        """Return α(ρ(G - QĜ) + s·QO), or α·Q·M̂/(√V̂ + ε)."""
        options = self.options
        if self.basis is None or (self.count + options["refresh_offset"]) % options["refresh_interval"] == 0:
            self._refresh(gradient)
        self.count += 1
        assert self.basis is not None
        x, y = self.basis
        a, b, c, d = gradient
        inside = (x * a + y * c, x * b + y * d) if self.left else (a * x + b * y, c * x + d * y)
        if self.momentum is None:
            return self._lifted(self._adam(inside), options["alpha"])
        factor = self._factor(self.momentum(inside))
        rho, alpha = options["residual_scale"], options["alpha"]
        s = update_scale(options["update_scale"], (2, 2), 1)
        moved = self._lifted((s * factor[0] - rho * inside[0], s * factor[1] - rho * inside[1]), alpha)
        keep = alpha * rho
        return keep * a + moved[0], keep * b + moved[1], keep * c + moved[2], keep * d + moved[3]

    def _lifted(self, moved: tuple[float, float], size: float) -> Matrix:
        assert self.basis is not None
        x, y = self.basis
        p, q = size * moved[0], size * moved[1]
        return (x * p, x * q, y * p, y * q) if self.left else (p * x, p * y, q * x, q * y)

    def _factor(self, m: Sequence[float]) -> tuple[float, float]:
        """Return a vector of unit length, or what Newton–Schulz makes of it."""
        if self.options["orthogonalizer"] == "newton_schulz":
            a, b, _, _ = newton_schulz((m[0], m[1], 0.0, 0.0), self.options["orthogonalizer_steps"])
            return a, b
        norm = math.hypot(m[0], m[1])
        return (m[0] / norm, m[1] / norm) if norm > 0.0 else (0.0, 0.0)

    def _adam(self, inside: tuple[float, float]) -> tuple[float, float]:
        (beta1, beta2), eps = self.options["betas"], self.options["eps"]
        bias1, root2 = 1.0 - beta1**self.count, math.sqrt(1.0 - beta2**self.count)
        floor = eps if self.options["eps_form"] == "raw" else eps * root2
        out = []
        for i, g in enumerate(inside):
            self.first[i] = m = beta1 * self.first[i] + (1.0 - beta1) * g
            self.second[i] = v = beta2 * self.second[i] + (1.0 - beta2) * g * g
            out.append(m / (math.sqrt(v) + floor) * (root2 / bias1))
        return out[0], out[1]

    def _refresh(self, gradient: Matrix) -> None:
        basis = leading(gradient, left=self.left)
        if self.basis is not None and self.momentum is not None and self.options["transport"]:
            overlap = basis[0] * self.basis[0] + basis[1] * self.basis[1]
            self.momentum.moment = [overlap * m for m in self.momentum.moment]
        self.basis = basis


def leading(m: Matrix, *, left: bool) -> tuple[float, float]:
    """Return the leading singular vector with its largest component positive (`rules.leading`)."""
    a, b, c, d = m
    # Eigenvector of MᵀM = [[p, r], [r, q]] for the larger eigenvalue.
    p, q, r = a * a + c * c, b * b + d * d, a * b + c * d
    half = 0.5 * (p - q)
    root = math.hypot(half, r)
    if p + q == 0.0:
        return 0.0, 0.0
    if half == 0.0:
        # Equal squares: the vector is (1, ±1)/√2 exactly, whose signs a tie decides.
        x, y = math.sqrt(0.5), math.copysign(math.sqrt(0.5), r)
    else:
        x, y = (half + root, r) if half > 0.0 else (r, root - half)
        norm = math.hypot(x, y)
        x, y = x / norm, y / norm
    if left:
        x, y = a * x + b * y, c * x + d * y
        norm = math.hypot(x, y)
        x, y = x / norm, y / norm
    leader = x if abs(x) >= max(abs(x), abs(y)) * TIE else y
    return (-x, -y) if leader < 0.0 else (x, y)
