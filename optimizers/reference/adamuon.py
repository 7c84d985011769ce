"""AdaMuon for one matrix in fp64: Algorithm 1 of arXiv 2507.11005v3."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from optimizers.reference.matrices import Matrix, newton_schulz


@dataclass
class AdaMuon:
    """State and settings of one (m, n) weight.

    Attributes:
        signs: orthogonalize the signs of the moment.
    """

    weight: Matrix
    lr: float
    momentum: float = 0.95
    beta2: float = 0.95
    eps: float = 1e-8
    decay: float = 0.0
    signs: bool = True

    def __post_init__(self) -> None:
        self.weight = np.array(self.weight, dtype=np.float64)
        self.moment = np.zeros_like(self.weight)
        self.second = np.zeros_like(self.weight)

    def step(self, gradient: Matrix) -> Matrix:
        """Take one step along an (m, n) gradient and return the new weight."""
        self.moment = self.momentum * self.moment + np.asarray(gradient, dtype=np.float64)
        o = newton_schulz(np.sign(self.moment) if self.signs else self.moment)
        self.second = self.beta2 * self.second + (1 - self.beta2) * o * o
        o = o / (np.sqrt(self.second) + self.eps)
        size = 0.2 * o.size**0.5 / np.linalg.norm(o)
        self.weight = self.weight - self.lr * (size * o + self.decay * self.weight)
        return self.weight
