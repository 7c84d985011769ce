"""SUMO in numpy, fp64, one matrix, written from Algorithm 1 of arXiv 2505.24749 and the behaviour of its
public code; every place where the two differ is an argument. Shares no code with `optimizers`."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]


def canonical(basis: Matrix) -> Matrix:
    """Columns with their largest component positive."""
    leaders = np.abs(basis).argmax(axis=0)
    return basis * np.sign(basis[leaders, np.arange(basis.shape[1])])


def polar(matrix: Matrix) -> Matrix:
    """U Vᵀ over the singular values above max(m, n)·eps32·σ1 (the cut for fp32 moments)."""
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    keep = s > max(matrix.shape) * np.finfo(np.float32).eps * (s[0] if s.size else 0.0)
    return (u * keep) @ vt


def newton_schulz(matrix: Matrix, steps: int = 5) -> Matrix:
    """Jordan's quintic."""
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / max(np.linalg.norm(x), 1e-7)
    for _ in range(steps):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x


@dataclass
class Sumo:
    """State and settings for one weight.

    `limiter` is Block 3 (γ, on the factor); `stored_nesterov` is the public code's look-ahead that overwrites
    its state; `offset` 1 is its step counter, which starts at 1.
    """

    weight: Matrix
    rank: int
    lr: float
    interval: int
    side: str = "short"
    transport: bool = True
    momentum: float = 0.95
    ema: bool = False
    nesterov: bool = False
    stored_nesterov: bool = False
    orthogonalizer: str = "svd"
    alpha: float = 1.0
    residual: float = 1.0
    decay: float = 0.0
    decay_last: bool = False
    offset: int = 0
    limiter: float | None = None
    scale: float | None = None
    t: int = 0

    def __post_init__(self) -> None:
        self.weight = np.array(self.weight, dtype=np.float64)
        m, n = self.weight.shape
        self.left = (m >= n) if self.side == "short" else (m < n)
        self.basis: Matrix | None = None
        self.moment = np.zeros((self.rank, n) if self.left else (m, self.rank))
        self.last_norm: float | None = None
        if self.scale is None:
            self.scale = 0.2 * np.sqrt(max(m, n))

    def refresh(self, gradient: Matrix) -> None:
        """Block 1 and 1.1."""
        u, _, vt = np.linalg.svd(gradient, full_matrices=False)
        new = canonical((u if self.left else vt.T)[:, : self.rank])
        if self.transport and self.basis is not None:
            rotation = new.T @ self.basis
            self.moment = rotation @ self.moment if self.left else self.moment @ rotation.T
        self.basis = new

    def factor(self, gradient: Matrix) -> Matrix:
        """Block 2: advance the moment by the projected gradient and orthogonalize."""
        mu, weight = self.momentum, (1 - self.momentum) if self.ema else 1.0
        self.moment = mu * self.moment + weight * gradient
        direction = self.moment
        if self.nesterov or self.stored_nesterov:
            direction = weight * gradient + mu * self.moment
        if self.stored_nesterov:
            self.moment = direction
        return newton_schulz(direction) if self.orthogonalizer == "newton_schulz" else polar(direction)

    def step(self, gradient: Matrix) -> Matrix:
        """One step; returns the new weight."""
        gradient = np.asarray(gradient, dtype=np.float64)
        if self.basis is None or (self.t + self.offset) % self.interval == 0:
            self.refresh(gradient)
        q = self.basis
        assert q is not None
        assert self.scale is not None
        projected = q.T @ gradient if self.left else gradient @ q
        factor = self.factor(projected)
        if self.limiter is not None:
            norm = float(np.linalg.norm(factor))
            if self.last_norm and norm > self.limiter * self.last_norm:
                factor = factor * (self.limiter * self.last_norm / norm)
            self.last_norm = float(np.linalg.norm(factor))

        def back(x: Matrix) -> Matrix:
            return q @ x if self.left else x @ q.T

        update = self.residual * (gradient - back(projected)) + self.scale * back(factor)
        if not self.decay_last:
            self.weight = self.weight * (1 - self.lr * self.decay)
        self.weight = self.weight - self.alpha * self.lr * update
        if self.decay_last:
            self.weight = self.weight * (1 - self.lr * self.decay)
        self.t += 1
        return self.weight
