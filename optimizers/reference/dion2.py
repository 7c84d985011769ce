"""Dion2 for one matrix in fp64: arXiv 2512.16928, with the exact factor of the chosen submatrix."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from optimizers.reference.matrices import Matrix, exact_polar


@dataclass
class Dion2:
    """State and settings of one (m, n) weight of a layer with m outputs.

    Attributes:
        chooses_all: orthogonalize the whole moment (then it is Muon with the momentum M ← μ(M + G)).
        decays_all: decay the whole moment, without error feedback.
    """

    weight: Matrix
    lr: float
    momentum: float = 0.95
    fraction: float = 0.25
    decay: float = 0.0
    chooses_all: bool = False
    decays_all: bool = False

    def __post_init__(self) -> None:
        self.weight = np.array(self.weight, dtype=np.float64)
        self.moment = np.zeros_like(self.weight)

    def step(self, gradient: Matrix) -> Matrix:
        """Take one step along an (m, n) gradient and return the new weight."""
        m, n = self.weight.shape
        self.moment = self.moment + np.asarray(gradient, dtype=np.float64)
        # Views: what is written to rows of the transposed arrays is written to columns of the originals.
        moment, update = self.moment, np.zeros_like(self.weight)
        if m > n:
            moment, update = moment.T, update.T
        count = len(moment) if self.chooses_all else max(1, int(np.ceil(self.fraction * len(moment) - 1e-9)))
        chosen = np.argsort(-np.abs(moment).sum(axis=1), kind="stable")[:count]
        update[chosen] = exact_polar(moment[chosen])
        moment[slice(None) if self.decays_all else chosen] *= self.momentum
        if m > n:
            update = update.T
        self.weight = (1 - self.lr * self.decay) * self.weight - self.lr * np.sqrt(m / n) * update
        return self.weight
