"""GaLore in numpy, fp64, one matrix, from arXiv 2403.03507, Algorithm 2, with the side of the public code;
and Adam beside it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tests.oracles.sumo import Matrix, canonical


@dataclass
class GaLore:
    """State and settings for one weight. `raw_eps`: ε is added to √V before bias correction (the public
    code)."""

    weight: Matrix
    rank: int
    lr: float
    interval: int
    alpha: float = 0.25
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-6
    raw_eps: bool = True
    side: str = "long"
    t: int = 0

    def __post_init__(self) -> None:
        self.weight = np.array(self.weight, dtype=np.float64)
        m, n = self.weight.shape
        self.left = (m < n) if self.side == "long" else (m >= n)
        shape = (self.rank, n) if self.left else (m, self.rank)
        self.first, self.second = np.zeros(shape), np.zeros(shape)
        self.basis: Matrix | None = None

    def step(self, gradient: Matrix) -> Matrix:
        """One step; returns the new weight."""
        gradient = np.asarray(gradient, dtype=np.float64)
        if self.t % self.interval == 0:
            u, _, vt = np.linalg.svd(gradient, full_matrices=False)
            self.basis = canonical((u if self.left else vt.T)[:, : self.rank])
        q = self.basis
        assert q is not None
        projected = q.T @ gradient if self.left else gradient @ q
        b1, b2 = self.betas
        self.t += 1
        self.first = b1 * self.first + (1 - b1) * projected
        self.second = b2 * self.second + (1 - b2) * projected**2
        c1, c2 = 1 - b1**self.t, 1 - b2**self.t
        if self.raw_eps:
            normal = np.sqrt(c2) / c1 * self.first / (np.sqrt(self.second) + self.eps)
        else:
            normal = (self.first / c1) / (np.sqrt(self.second / c2) + self.eps)
        self.weight = self.weight - self.lr * self.alpha * (q @ normal if self.left else normal @ q.T)
        return self.weight


@dataclass
class Adam:
    """AdamW for one tensor; `raw_eps` as above."""

    weight: Matrix
    lr: float
    betas: tuple[float, float]
    eps: float
    decay: float = 0.0
    raw_eps: bool = False
    t: int = 0

    def __post_init__(self) -> None:
        self.weight = np.array(self.weight, dtype=np.float64)
        self.first, self.second = np.zeros_like(self.weight), np.zeros_like(self.weight)

    def step(self, gradient: Matrix) -> Matrix:
        """One step; returns the new weight."""
        gradient = np.asarray(gradient, dtype=np.float64)
        b1, b2 = self.betas
        self.t += 1
        self.first = b1 * self.first + (1 - b1) * gradient
        self.second = b2 * self.second + (1 - b2) * gradient**2
        c1, c2 = 1 - b1**self.t, 1 - b2**self.t
        eps = self.eps / np.sqrt(c2) if self.raw_eps else self.eps
        self.weight = self.weight * (1 - self.lr * self.decay)
        self.weight = self.weight - self.lr * (self.first / c1) / (np.sqrt(self.second / c2) + eps)
        return self.weight
