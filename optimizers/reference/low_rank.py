"""Members of the low-rank family for one matrix in fp64, each in the order of its paper.

Written for a matrix whose basis multiplies from the left (G is L×k, Q is L×r); where the paper or its public code
projects the other side, everything happens to the transposed matrix. Random bases are taken as they come from
`normals`, so that both sides of a test can use the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from optimizers.reference.matrices import Matrix, leading_vectors, polar

Normals = Callable[[int, int, int], Matrix]
"""(t, rows, rank) → standard normal numbers."""


@dataclass
class _LowRank:
    """What the members share: weight, rate, side and time.

    Attributes:
        long: the moments keep the long side (GaLore's `std`), else the short one.
    """

    weight: Matrix
    rank: int
    lr: float
    interval: int = 1
    long: bool = True
    t: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self.weight = np.array(self.weight, dtype=np.float64)
        m, n = self.weight.shape
        self.left = m < n if self.long else m >= n
        self.length, self.width = (m, n) if self.left else (n, m)
        self.basis = np.zeros((self.length, self.rank))
        self.first = np.zeros((self.rank, self.width))
        self.second = np.zeros((self.rank, self.width))
        self.last_norm = 0.0

    def step(self, gradient: Matrix) -> Matrix:
        """Take one step along an (m, n) gradient and return the new weight."""
        g = np.asarray(gradient if self.left else gradient.T, dtype=np.float64)
        update = self.update(g)
        self.weight = self.weight - self.lr * (update if self.left else update.T)
        self.t += 1
        return self.weight

    def update(self, g: Matrix) -> Matrix:
        """Return the update along an L×k gradient."""
        raise NotImplementedError

    @property
    def is_due(self) -> bool:
        """Return True where the subspace is renewed."""
        return self.t % self.interval == 0

    @property
    def is_found_anew(self) -> bool:
        """Return True where a basis that is moved on comes from an SVD: the first, and incomplete ones at t = 2ᵏ."""
        return self.t == 0 or (self.t & (self.t - 1) == 0 and not self.basis.any(axis=0).all())

    def adam(self, inside: Matrix, betas: tuple[float, float], eps: float, raw: bool) -> tuple[Matrix, float]:
        """Advance both moments; return M/(√V + ε) and √b₂/b₁, with ε√b₂ instead of ε unless `raw`."""
        beta1, beta2 = betas
        self.first = beta1 * self.first + (1 - beta1) * inside
        self.second = beta2 * self.second + (1 - beta2) * inside**2
        b1, b2 = 1 - beta1 ** (self.t + 1), 1 - beta2 ** (self.t + 1)
        floor = eps if raw else eps * np.sqrt(b2)
        return self.first / (np.sqrt(self.second) + floor), float(np.sqrt(b2) / b1)

    def limited(self, matrix: Matrix, limit: float) -> Matrix:
        """Shrink a matrix so that its norm grows at most by `limit` a step."""
        norm = float(np.linalg.norm(matrix))
        if self.last_norm and norm > limit * self.last_norm:
            matrix, norm = matrix * (limit * self.last_norm / norm), limit * self.last_norm
        self.last_norm = norm
        return matrix

    def carry(self, new: Matrix, betas: tuple[float, float]) -> None:
        """Bring both moments into a new basis as statistics (arXiv 2410.16103, §3)."""
        overlap, t = new.T @ self.basis, self.t
        if t:
            b1, b2 = 1 - betas[0] ** t, 1 - betas[1] ** t
            first, second = self.first / b1, self.second / b2
            self.second = b2 * np.abs((overlap**2) @ (second - first**2) + (overlap @ first) ** 2)
            self.first = overlap @ self.first
        self.basis = new


@dataclass
class Fira(_LowRank):
    """Fira: GaLore, and the rest of the gradient scaled by column like Adam scaled the gradient inside (2410.01623)."""

    alpha: float = 0.25
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-6
    limit: float = 1.01

    def update(self, g: Matrix) -> Matrix:
        """Return α(Q ψ(R) + φ(R)(G - Q R))."""
        if self.is_due:
            self.basis = leading_vectors(g, self.rank, left=True)
        q = self.basis
        r = q.T @ g
        psi, bias = self.adam(r, self.betas, self.eps, raw=True)
        phi = np.linalg.norm(psi, axis=0) / (np.linalg.norm(r, axis=0) + 1e-8)
        rest = self.limited(phi * (g - q @ r), self.limit)
        return self.alpha * bias * (q @ psi + rest)


@dataclass
class Apollo(_LowRank):
    """APOLLO: Adam under a random projection gives the size of each channel, or of the matrix (arXiv 2412.05270)."""

    alpha: float = 1.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-6
    limit: float = 1.01
    by_channel: bool = True
    normals: Normals | None = None

    def update(self, g: Matrix) -> Matrix:
        """Return α·G·diag(s), s_j = ‖R̃_j‖/‖R_j‖."""
        assert self.normals is not None
        if self.is_due:
            self.basis = self.normals(self.t, self.length, self.rank) / np.sqrt(self.rank)
        r = self.basis.T @ g
        scaled, bias = self.adam(r, self.betas, self.eps, raw=True)
        axis = 0 if self.by_channel else None
        s = np.linalg.norm(scaled, axis=axis) / (np.linalg.norm(r, axis=axis) + 1e-8)
        return self.alpha * bias * self.limited(g * s, self.limit)


@dataclass
class LDAdam(_LowRank):
    """LDAdam: the subspace follows in every step, and what is lost is fed back (arXiv 2410.16103, Algorithm 1)."""

    betas: tuple[float, float] = (0.908, 0.99)
    eps: float = 1e-8
    rho: float = 0.908

    def __post_init__(self) -> None:
        super().__post_init__()
        self.error = np.zeros((self.length, self.width))

    def update(self, g: Matrix) -> Matrix:
        """Return P M̂/(√V̂ + ε) and keep the error."""
        beta1 = self.betas[0]
        a = g + self.error
        old, moment = self.basis, self.first
        if self.is_found_anew:
            new = leading_vectors(a, self.rank, left=True)
        else:
            mixed = self.rho * old @ moment / (1 - beta1**self.t) + (1 - self.rho) * a
            q, r = np.linalg.qr(mixed @ (mixed.T @ old))
            new = q * np.sign(np.diag(r))
        self.carry(new, self.betas)
        carried, inside = self.first, new.T @ a
        direction, bias = self.adam(inside, self.betas, self.eps, raw=False)
        self.error = a - new @ inside + beta1 / (1 - beta1) * (old @ moment - new @ carried)
        return bias * new @ direction


@dataclass
class SubTrack(_LowRank):
    """SubTrack++: the basis moves along geodesics of the Grassmannian (arXiv 2502.01586)."""

    alpha: float = 0.25
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-6
    limit: float = 1.01
    eta: float = 1.0

    def update(self, g: Matrix) -> Matrix:
        """Return the update of Fira in the tracked subspace, with moments that are carried over."""
        if self.is_found_anew:
            self.carry(leading_vectors(g, self.rank, left=True), self.betas)
        elif self.is_due:
            s = self.basis
            inside = s.T @ g
            derivative = -2 * (g - s @ inside) @ inside.T
            u, sigma, vt = np.linalg.svd(-derivative, full_matrices=False)
            angle, v = self.eta * sigma[0], vt[:1].T
            rotated = (s @ v * np.cos(angle) + u[:, :1] * np.sin(angle)) @ v.T
            self.carry(rotated + s @ (np.eye(self.rank) - v @ v.T), self.betas)
        q = self.basis
        r = q.T @ g
        psi, bias = self.adam(r, self.betas, self.eps, raw=True)
        phi = np.linalg.norm(psi, axis=0) / (np.linalg.norm(r, axis=0) + 1e-8)
        return self.alpha * bias * (q @ psi + self.limited(phi * (g - q @ r), self.limit))


@dataclass
class DctSubspace(_LowRank):
    """DCT-AdamW: the columns of the DCT-II matrix that hold most of the gradient (arXiv 2505.17967)."""

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    feedback: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        length = self.length
        j, k = np.arange(length)[:, None], np.arange(length)
        self.dct = np.sqrt(2 / length) * np.cos(np.pi * (2 * j + 1) * k / (2 * length))
        self.dct[:, 0] = np.sqrt(1 / length)
        self.error = np.zeros((self.length, self.width))

    def update(self, g: Matrix) -> Matrix:
        """Return Q M̂/(√V̂ + ε)."""
        a = g + self.error
        if self.is_due:
            energy = np.linalg.norm(self.dct.T @ a, axis=1)
            chosen = np.sort(np.argsort(-energy, kind="stable")[: self.rank])
            new = self.dct[:, chosen]
            overlap = new.T @ self.basis
            self.first, self.second = overlap @ self.first, np.abs(overlap @ self.second)
            self.basis = new
        inside = self.basis.T @ a
        if self.feedback:
            self.error = a - self.basis @ inside
        direction, bias = self.adam(inside, self.betas, self.eps, raw=False)
        return bias * self.basis @ direction


@dataclass
class Gum(_LowRank):
    """GUM: low-rank and full-rank periods, weighted so that the mean of what enters is G (arXiv 2510.17802)."""

    momentum: float = 0.95
    probability: float = 0.1
    scale: float = 1.0
    coin: Callable[[int], bool] | None = None  # number of the period → full rank

    def update(self, g: Matrix) -> Matrix:
        """Return Q·orth(R) in a low-rank period, orth(R) in a full-rank one."""
        assert self.coin is not None
        mu, p = self.momentum, self.probability
        is_full = self.coin(self.t // self.interval)
        if self.is_due:
            self.basis = leading_vectors(g, self.rank, left=True)
            self.first = np.zeros_like(g) if is_full else np.zeros((self.rank, self.width))
        q = self.basis
        entering = (g - q @ q.T @ g) / p if is_full else q.T @ g / (1 - p)
        self.first = mu * self.first + entering
        factor = polar(self.first)
        return self.scale * (factor if is_full else q @ factor)
