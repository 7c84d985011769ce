"""SUMO for one matrix in fp64: Algorithm 1 of arXiv 2505.24749.

Where the paper and its public code differ, the difference is a field; the defaults are the paper's.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from optimizers.reference.matrices import Matrix, leading_vectors, newton_schulz, polar


@dataclass
class Sumo:
    """State and settings of one (m, n) weight; see `optimizers.rules.sumo` for what each option means.

    Attributes:
        left: Q multiplies the gradient from the left (Ĝ = QᵀG), otherwise from the right (Ĝ = GQ).
        stored_nesterov: the look-ahead overwrites the moment, as in the public code.
        decay_last: weight decay follows the step, as in the public code.
        limiter: γ of Block 3; None: no limit on the growth of the factor's norm.
        scale: s in front of the factor; None: 0.2·√max(m, n).
    """

    weight: Matrix
    rank: int
    lr: float
    interval: int
    side: str = "short"
    transport: bool = True
    momentum: float = 0.95
    ema: bool = False
    nesterov: bool = False
    stored_nesterov: bool = False
    orthogonalizer: str = "svd"
    alpha: float = 1.0
    residual: float = 1.0
    decay: float = 0.0
    decay_last: bool = False
    offset: int = 0
    limiter: float | None = None
    scale: float | None = None
    t: int = 0

    def __post_init__(self) -> None:
        self.weight = np.array(self.weight, dtype=np.float64)
        m, n = self.weight.shape
        self.left = (m >= n) if self.side == "short" else (m < n)
        self.basis: Matrix | None = None
        self.moment = np.zeros((self.rank, n) if self.left else (m, self.rank))
        self.last_norm = 0.0
        if self.scale is None:
            self.scale = 0.2 * np.sqrt(max(m, n))

    def step(self, gradient: Matrix) -> Matrix:
        """Take one step along an (m, n) gradient and return the new weight."""
        g = np.asarray(gradient, dtype=np.float64)
        if self.basis is None or (self.t + self.offset) % self.interval == 0:
            self.refresh(g)  # Block 1
        q = self.basis
        assert q is not None
        assert self.scale is not None
        projected = q.T @ g if self.left else g @ q  # Ĝ
        factor = self.limited(self.orthogonalized(projected))  # Blocks 2 and 3
        lift = (lambda x: q @ x) if self.left else (lambda x: x @ q.T)
        # Block 4: the factor inside the subspace, the gradient itself outside of it.
        update = self.scale * lift(factor) + self.residual * (g - lift(projected))
        kept = 1 - self.lr * self.decay
        if self.decay_last:
            self.weight = kept * (self.weight - self.lr * self.alpha * update)
        else:
            self.weight = kept * self.weight - self.lr * self.alpha * update
        self.t += 1
        return self.weight

    def refresh(self, gradient: Matrix) -> None:
        """Take the leading singular vectors of the gradient as basis and carry the moment over (Block 1.1)."""
        new = leading_vectors(gradient, self.rank, self.left)
        if self.transport and self.basis is not None:
            rotation = new.T @ self.basis
            self.moment = rotation @ self.moment if self.left else self.moment @ rotation.T
        self.basis = new

    def orthogonalized(self, projected: Matrix) -> Matrix:
        """Advance the moment by the projected gradient and return its orthogonal factor (Block 2)."""
        weight = (1 - self.momentum) if self.ema else 1.0
        self.moment = direction = self.momentum * self.moment + weight * projected
        if self.nesterov or self.stored_nesterov:
            direction = weight * projected + self.momentum * self.moment
        if self.stored_nesterov:
            self.moment = direction
        return newton_schulz(direction) if self.orthogonalizer == "newton_schulz" else polar(direction)

    def limited(self, factor: Matrix) -> Matrix:
        """Return the factor, shrunk so that its norm grows at most by γ from step to step (Block 3)."""
        norm = float(np.linalg.norm(factor))
        if self.limiter is not None and self.last_norm and norm > self.limiter * self.last_norm:
            factor = factor * (self.limiter * self.last_norm / norm)
        self.last_norm = float(np.linalg.norm(factor))
        return factor
