"""Matrix rules on one 2×2 matrix [w | b] in plain Python numbers (see `scalar`): `rules` again, ten times as fast."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from analysis.margin.matrices import JORDAN
from analysis.margin.rules import scale

Matrix = tuple[float, float, float, float]
"""Rows of a 2×2 matrix, one after the other."""
Update = Callable[[Matrix], Matrix]
EPS = 2.0**-52
TIE = 1.0 - 16.0 * EPS


def update(kind: str, options: Mapping[str, Any]) -> Update:
    """A function gradient → what a step subtracts, over lr; it keeps the optimizer's state."""
    if kind == "spectral":
        return polar
    if kind == "muon":
        return _muon(options)
    return _Subspace(kind, options).step


def polar(m: Matrix) -> Matrix:
    """The exact polar factor (`matrices.polar`)."""
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
    """Jordan's quintic (`matrices.newton_schulz`)."""
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


def _muon(options: Mapping[str, Any]) -> Update:
    blend = _Momentum(options, 4)
    size = scale(options["update_scale"], (2, 2)) * options["alpha"]
    steps = options["orthogonalizer_steps"] if options["orthogonalizer"] == "newton_schulz" else None

    def step(gradient: Matrix) -> Matrix:
        a, b, c, d = blend(gradient)
        factor = polar((a, b, c, d)) if steps is None else newton_schulz((a, b, c, d), steps)
        return factor[0] * size, factor[1] * size, factor[2] * size, factor[3] * size

    return step


class _Momentum:
    """gradient → what is orthogonalized (`optimizers.rules.orthogonalize.momentum`)."""

    def __init__(self, options: Mapping[str, Any], length: int) -> None:
        self.mu, self.nesterov = options["momentum"], options["nesterov"]
        self.weight = 1.0 if options["momentum_form"] == "sum" else 1.0 - self.mu
        self.moment = [0.0] * length

    def __call__(self, gradient: Sequence[float]) -> Sequence[float]:
        """Advance the moment."""
        mu, weight = self.mu, self.weight
        if self.nesterov == "stored":
            self.moment = [mu * mu * m + weight * (1.0 + mu) * g for m, g in zip(self.moment, gradient)]
            return self.moment
        self.moment = [mu * m + weight * g for m, g in zip(self.moment, gradient)]
        if self.nesterov:
            return [weight * g + mu * m for m, g in zip(self.moment, gradient)]
        return self.moment


class _Subspace:
    """SUMO and GaLore of rank 1."""

    def __init__(self, kind: str, options: Mapping[str, Any]) -> None:
        self.options = options
        self.is_sumo = kind == "sumo"
        self.left = options["side"] == "short"  # a square matrix: from the left, or from the right
        self.basis: tuple[float, float] | None = None
        self.count = 0
        self.first, self.second = [0.0, 0.0], [0.0, 0.0]
        self.blend = _Momentum(options, 2) if self.is_sumo else None

    def step(self, gradient: Matrix) -> Matrix:
        """α(ρ(G - QĜ) + s·QO), or α·Q·M̂/(√V̂ + ε)."""
        options = self.options
        if self.basis is None or (self.count + options["refresh_offset"]) % options["refresh_interval"] == 0:
            self._refresh(gradient)
        self.count += 1
        assert self.basis is not None
        x, y = self.basis
        a, b, c, d = gradient
        inside = (x * a + y * c, x * b + y * d) if self.left else (a * x + b * y, c * x + d * y)
        if not self.is_sumo:
            return self._lifted(self._adam(inside), options["alpha"])
        assert self.blend is not None
        factor = self._factor(self.blend(inside))
        s, rho, alpha = scale(options["update_scale"], (2, 2), 1), options["residual_scale"], options["alpha"]
        moved = self._lifted((s * factor[0] - rho * inside[0], s * factor[1] - rho * inside[1]), alpha)
        keep = alpha * rho
        return keep * a + moved[0], keep * b + moved[1], keep * c + moved[2], keep * d + moved[3]

    def _lifted(self, moved: tuple[float, float], size: float) -> Matrix:
        assert self.basis is not None
        x, y = self.basis
        p, q = size * moved[0], size * moved[1]
        return (x * p, x * q, y * p, y * q) if self.left else (p * x, p * y, q * x, q * y)

    def _factor(self, m: Sequence[float]) -> tuple[float, float]:
        """A vector of unit length, or what Newton–Schulz makes of it."""
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
        new = leading(gradient, left=self.left)
        if self.basis is not None and self.is_sumo and self.options["transport"]:
            assert self.blend is not None
            overlap = new[0] * self.basis[0] + new[1] * self.basis[1]
            self.blend.moment = [overlap * m for m in self.blend.moment]
        self.basis = new


def leading(m: Matrix, *, left: bool) -> tuple[float, float]:
    """The leading singular vector with its largest component positive (`matrices.leading`)."""
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
