"""GaLore for one matrix in fp64: Algorithm 2 of arXiv 2403.03507, with the side that its public code projects."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from optimizers.reference.adamw import Adam
from optimizers.reference.matrices import Matrix, leading_vectors


@dataclass
class GaLore:
    """State and settings of one (m, n) weight.

    Attributes:
        side: "long": the moments keep the long side (public code); "short": the short one (SUMO's paper).
        raw_eps: ε is added to √V before the bias correction, as in the public code.
    """

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
        self.adam = Adam((self.rank, n) if self.left else (m, self.rank), self.betas, self.eps, self.raw_eps)
        self.basis: Matrix | None = None

    def step(self, gradient: Matrix) -> Matrix:
        """Take one step along an (m, n) gradient and return the new weight."""
        g = np.asarray(gradient, dtype=np.float64)
        if self.t % self.interval == 0:
            self.basis = leading_vectors(g, self.rank, self.left)  # the old moments stay as they are
        q = self.basis
        assert q is not None
        direction = self.adam(q.T @ g if self.left else g @ q)
        lifted = q @ direction if self.left else direction @ q.T
        self.weight = self.weight - self.lr * self.alpha * lifted
        self.t += 1
        return self.weight
