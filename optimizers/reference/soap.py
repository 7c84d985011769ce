"""SOAP for one matrix in fp64: Algorithms 3 and 4 of arXiv 2409.11321, started as its public code starts.

Everything is written with M in the parameters' own coordinates, as in the paper.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from optimizers.reference.matrices import Matrix, eigenvectors


@dataclass
class Soap:
    """State and settings of one (m, n) weight.

    Attributes:
        interval: K, steps between power iterations.
        left, right: rotate this side.
        sorts: sort the columns of a basis by their eigenvalue estimates before QR (and V with them).
    """

    weight: Matrix
    lr: float
    betas: tuple[float, float] = (0.95, 0.95)
    eps: float = 1e-8
    interval: int = 10
    decay: float = 0.0
    left: bool = True
    right: bool = True
    sorts: bool = True

    def __post_init__(self) -> None:
        self.weight = np.array(self.weight, dtype=np.float64)
        m, n = self.weight.shape
        self.l, self.r = np.zeros((m, m)), np.zeros((n, n))
        self.ql, self.qr = np.eye(m), np.eye(n)
        self.moment, self.second = np.zeros((m, n)), np.zeros((m, n))
        self.t = 0

    def step(self, gradient: Matrix) -> Matrix:
        """Take one step along an (m, n) gradient and return the new weight; the first one moves by decay only."""
        g, (beta1, beta2), t = np.asarray(gradient, dtype=np.float64), self.betas, self.t
        self.weight = (1 - self.lr * self.decay) * self.weight
        if t == 0:
            self.ql = eigenvectors(g @ g.T, g.shape) if self.left else self.ql
            self.qr = eigenvectors(g.T @ g, g.shape) if self.right else self.qr
        else:
            rotated = self.ql.T @ g @ self.qr
            self.moment = beta1 * self.moment + (1 - beta1) * g
            self.second = beta2 * self.second + (1 - beta2) * rotated**2
            direction = (self.ql.T @ self.moment @ self.qr) / (np.sqrt(self.second) + self.eps)
            size = np.sqrt(1 - beta2**t) / (1 - beta1**t)
            self.weight = self.weight - self.lr * size * self.ql @ direction @ self.qr.T
        self.l = beta2 * self.l + (1 - beta2) * g @ g.T
        self.r = beta2 * self.r + (1 - beta2) * g.T @ g
        if t > 0 and t % self.interval == 0:
            if self.left:
                order = self._order(self.l, self.ql)
                self.second = self.second[order]
                self.ql = np.linalg.qr(self.l @ self.ql[:, order])[0]
            if self.right:
                order = self._order(self.r, self.qr)
                self.second = self.second[:, order]
                self.qr = np.linalg.qr(self.r @ self.qr[:, order])[0]
        self.t += 1
        return self.weight

    def _order(self, gram: Matrix, basis: Matrix) -> NDArray[np.intp]:
        estimates = np.diag(basis.T @ gram @ basis)
        return np.argsort(-estimates, kind="stable") if self.sorts else np.arange(len(estimates))
