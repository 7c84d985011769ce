"""Gradients for tests of optimizers: reproducible, with a clear leading subspace that drifts from step to
step."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]


class Stream:
    """Gradient of step t at a weight W: a rank-r signal with singular values 1 … 0.4 that turns by about 0.2
    a step, a tail `tail` times smaller, and 0.02·W, so that an error in the weights comes back.

    The gap between signal and tail makes the leading subspace well defined, so that an exact and a randomized
    basis span the same one.
    """

    def __init__(self, shape: tuple[int, int], rank: int, seed: int = 0, tail: float = 1e-2) -> None:
        self.random = np.random.default_rng(seed)
        self.shape, self.rank, self.tail = shape, rank, tail
        m, n = shape
        self.left = self.random.standard_normal((m, rank))
        self.right = self.random.standard_normal((n, rank))
        self.values = np.linspace(1.0, 0.4, rank)
        self.start = 0.1 * self.random.standard_normal(shape)

    def __call__(self, weight: Matrix) -> Matrix:
        """The next gradient."""
        self.left = self.left + 0.2 * self.random.standard_normal(self.left.shape)
        self.right = self.right + 0.2 * self.random.standard_normal(self.right.shape)
        u, _ = np.linalg.qr(self.left)
        v, _ = np.linalg.qr(self.right)
        noise = self.tail * self.random.standard_normal(self.shape) / np.sqrt(max(self.shape))
        return (u * self.values) @ v.T + noise + 0.02 * self.tail * weight
