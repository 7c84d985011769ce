"""NorMuon for one matrix in fp64: Algorithm 1 of arXiv 2510.05491."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from optimizers.reference.matrices import Matrix, newton_schulz


@dataclass
class NorMuon:
    """State and settings of one (m, n) weight whose rows are output neurons.

    Attributes:
        nesterov: look ahead, which the authors' code does and Algorithm 1 does not.
    """

    weight: Matrix
    lr: float
    momentum: float = 0.95
    beta2: float = 0.95
    eps: float = 1e-10
    decay: float = 0.0
    nesterov: bool = False

    def __post_init__(self) -> None:
        self.weight = np.array(self.weight, dtype=np.float64)
        self.moment = np.zeros_like(self.weight)
        self.rows = np.zeros((self.weight.shape[0], 1))

    def step(self, gradient: Matrix) -> Matrix:
        """Take one step along an (m, n) gradient and return the new weight."""
        g, mu = np.asarray(gradient, dtype=np.float64), self.momentum
        self.moment = mu * self.moment + (1 - mu) * g
        o = newton_schulz((1 - mu) * g + mu * self.moment if self.nesterov else self.moment)
        self.rows = self.beta2 * self.rows + (1 - self.beta2) * (o * o).mean(axis=1, keepdims=True)
        o = o / (np.sqrt(self.rows) + self.eps)
        size = 0.2 * o.size**0.5 / np.linalg.norm(o)
        self.weight = self.weight - self.lr * self.decay * self.weight - self.lr * size * o
        return self.weight
