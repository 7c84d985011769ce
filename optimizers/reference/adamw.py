"""AdamW in fp64: arXiv 1412.6980 with the decoupled weight decay of arXiv 1711.05101."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from optimizers.reference.matrices import Matrix


class Adam:
    """Both moments of one array, and the direction M̂/(√V̂ + ε) that they give.

    Args:
        shape: of the array.
        betas: β₁, β₂.
        eps: ε.
        raw_eps: add ε to √V before the bias correction, as galore-torch does.
    """

    def __init__(self, shape: tuple[int, ...], betas: tuple[float, float], eps: float, raw_eps: bool) -> None:
        self.betas, self.eps, self.raw_eps = betas, eps, raw_eps
        self.first, self.second, self.t = np.zeros(shape), np.zeros(shape), 0

    def __call__(self, gradient: Matrix) -> Matrix:
        """Advance both moments by a gradient and return the direction."""
        (beta1, beta2), self.t = self.betas, self.t + 1
        self.first = beta1 * self.first + (1 - beta1) * gradient
        self.second = beta2 * self.second + (1 - beta2) * gradient**2
        bias1, bias2 = 1 - beta1**self.t, 1 - beta2**self.t
        eps = self.eps / np.sqrt(bias2) if self.raw_eps else self.eps
        return (self.first / bias1) / (np.sqrt(self.second / bias2) + eps)


@dataclass
class AdamW:
    """State and settings of one weight of any shape."""

    weight: Matrix
    lr: float
    betas: tuple[float, float]
    eps: float
    decay: float = 0.0
    raw_eps: bool = False

    def __post_init__(self) -> None:
        self.weight = np.array(self.weight, dtype=np.float64)
        self.adam = Adam(self.weight.shape, self.betas, self.eps, self.raw_eps)

    def step(self, gradient: Matrix) -> Matrix:
        """Take one step and return the new weight."""
        direction = self.adam(np.asarray(gradient, dtype=np.float64))
        self.weight = (1 - self.lr * self.decay) * self.weight - self.lr * direction
        return self.weight
