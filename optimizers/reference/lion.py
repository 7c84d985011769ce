"""Lion for one array in fp64: Program 1 of arXiv 2302.06675."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from optimizers.reference.matrices import Matrix


@dataclass
class Lion:
    """State and settings of one weight of any shape."""

    weight: Matrix
    lr: float
    betas: tuple[float, float] = (0.9, 0.99)
    decay: float = 0.0

    def __post_init__(self) -> None:
        self.weight = np.array(self.weight, dtype=np.float64)
        self.moment = np.zeros_like(self.weight)

    def step(self, gradient: Matrix) -> Matrix:
        """Take one step and return the new weight."""
        g, (beta1, beta2) = np.asarray(gradient, dtype=np.float64), self.betas
        direction = np.sign(beta1 * self.moment + (1 - beta1) * g)
        self.moment = beta2 * self.moment + (1 - beta2) * g
        self.weight = self.weight - self.lr * (direction + self.decay * self.weight)
        return self.weight
