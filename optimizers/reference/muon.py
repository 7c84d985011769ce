"""Muon for one matrix in fp64: Jordan's form (EMA momentum) and Moonlight's (arXiv 2502.16982, classic momentum)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from optimizers.reference.matrices import Matrix, exact_polar, newton_schulz


@dataclass
class Muon:
    """State and settings of one (m, n) weight.

    Attributes:
        ema: M ← μM + (1 - μ)G; otherwise M ← μM + G.
        scale: "rows_cols", √max(1, m/n) (Jordan); anything else, 0.2·√max(m, n) (Moonlight).
    """

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
        """Take one step along an (m, n) gradient and return the new weight."""
        g = np.asarray(gradient, dtype=np.float64)
        weight = (1 - self.momentum) if self.ema else 1.0
        self.moment = self.momentum * self.moment + weight * g
        direction = weight * g + self.momentum * self.moment if self.nesterov else self.moment
        is_polynomial = self.orthogonalizer == "newton_schulz"
        factor = newton_schulz(direction, self.steps) if is_polynomial else exact_polar(direction)
        m, n = self.weight.shape
        size = max(1.0, m / n) ** 0.5 if self.scale == "rows_cols" else 0.2 * max(m, n) ** 0.5
        self.weight = (1 - self.lr * self.decay) * self.weight - self.lr * size * factor
        return self.weight
