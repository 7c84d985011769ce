"""SUMO for one matrix in fp64: Algorithm 1 of arXiv 2505.24749, and what its public code does differently."""

from dataclasses import dataclass

import numpy as np

from optimizers.reference.matrices import Matrix, leading_vectors, newton_schulz, polar


@dataclass
class Sumo:
    """Weight, state and settings. Where Q multiplies from the right, everything happens to the transposed matrix."""

    weight: Matrix
    rank: int
    lr: float
    interval: int
    offset: int = 0
    side: str = "short"
    transport: bool = True
    momentum: float = 0.95
    nesterov: bool | str = False  # "stored": the look-ahead overwrites the moment
    orthogonalizer: str = "svd"
    limiter: float | None = None  # γ of Block 3
    alpha: float = 1.0
    residual: float = 1.0
    decay: float = 0.0
    decay_last: bool = False  # weight decay follows the step

    def __post_init__(self) -> None:
        self.weight = np.array(self.weight, dtype=np.float64)
        m, n = self.weight.shape
        self.left = (m >= n) if self.side == "short" else (m < n)
        self.moment = np.zeros((self.rank, n if self.left else m))
        self.t, self.basis, self.last_norm = 0, np.zeros((0, 0)), 0.0
        self.scale = 0.2 * np.sqrt(max(m, n))

    def step(self, gradient: Matrix) -> Matrix:
        """Take one step along an (m, n) gradient and return the new weight."""
        g = np.asarray(gradient if self.left else gradient.T, dtype=np.float64)
        if self.t == 0 or (self.t + self.offset) % self.interval == 0:
            self.refresh(g)  # Block 1
        q, mu, self.t = self.basis, self.momentum, self.t + 1
        projected = q.T @ g
        self.moment = mu * self.moment + projected  # Block 2
        direction = mu * self.moment + projected if self.nesterov else self.moment
        self.moment = direction if self.nesterov == "stored" else self.moment
        factor = newton_schulz(direction) if self.orthogonalizer == "newton_schulz" else polar(direction)
        norm = float(np.linalg.norm(factor))
        if self.limiter and self.last_norm and norm > self.limiter * self.last_norm:  # Block 3
            factor, norm = factor * (self.limiter * self.last_norm / norm), self.limiter * self.last_norm
        self.last_norm = norm
        update = self.scale * q @ factor + self.residual * (g - q @ projected)  # Block 4
        step, kept = self.lr * self.alpha * (update if self.left else update.T), 1 - self.lr * self.decay
        self.weight = kept * (self.weight - step) if self.decay_last else kept * self.weight - step
        return self.weight

    def refresh(self, gradient: Matrix) -> None:
        """Take the leading singular vectors of the gradient as basis and carry the moment over."""
        new = leading_vectors(gradient, self.rank, left=True)
        self.moment = new.T @ self.basis @ self.moment if self.transport and self.t else self.moment
        self.basis = new
