"""Muon in numpy, fp64, one matrix: Jordan's (EMA momentum) and Moonlight's (classic momentum) forms."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tests.oracles.sumo import Matrix, newton_schulz


def exact(matrix: Matrix) -> Matrix:
    """U Vᵀ, all directions."""
    u, _, vt = np.linalg.svd(matrix, full_matrices=False)
    return u @ vt


@dataclass
class Muon:
    """State and settings for one weight; `scale` "rows_cols" is Jordan's √max(1, m/n), "rms_max"
    Moonlight's."""

    weight: Matrix
    lr: float
    momentum: float = 0.95
    ema: bool = True
    nesterov: bool = True
    scale: str = "rows_cols"
    orthogonalizer: str = "newton_schulz"
    steps: int = 5
    decay: float = 0.0

    def __post_init__(self) -> None:
        self.weight = np.array(self.weight, dtype=np.float64)
        self.moment = np.zeros_like(self.weight)

    def step(self, gradient: Matrix) -> Matrix:
        """One step; returns the new weight."""
        gradient = np.asarray(gradient, dtype=np.float64)
        mu, weight = self.momentum, (1 - self.momentum) if self.ema else 1.0
        self.moment = mu * self.moment + weight * gradient
        direction = weight * gradient + mu * self.moment if self.nesterov else self.moment
        factor = (
            newton_schulz(direction, self.steps)
            if self.orthogonalizer == "newton_schulz"
            else exact(direction)
        )
        m, n = self.weight.shape
        size = max(1.0, m / n) ** 0.5 if self.scale == "rows_cols" else 0.2 * max(m, n) ** 0.5
        self.weight = self.weight * (1 - self.lr * self.decay) - self.lr * size * factor
        return self.weight
