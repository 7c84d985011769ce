"""Update rules in plain numpy for many small nets at once: what they subtract from the weights, over lr.

These are the rules of `optimizers` computed again without torch, whose step costs more than a million times the
arithmetic of a net of six numbers; `optimizers.reference` has the same rules for one matrix, as teaching text. Tests
hold each rule here to the real class over 10,000 steps. A gradient is a list: hidden (k, d + 1, R), then output (k, R)
where v is trained. Polar factors and leading subspaces are those that `optimizers.linalg` defines.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from analysis.margin.optimizer_specs import OptimizerSpec
from optimizers.refresh_schedule import resolved_stagger

Floats = NDArray[np.floating]
EXACT_FACTORS = ("auto", "svd", "qr_svd", "gram", "dwh")
OVERSAMPLING = 8
"""Columns that the randomized basis of `optimizers` draws beyond the rank."""
GRAM_RTOL = 1e-6
"""Below this share of σ1 a Gram matrix in fp64 holds no vectors (`optimizers.linalg.inverse_root`)."""
JORDAN = (3.4445, -4.7750, 2.0315)
"""Coefficients of Muon's quintic Newton–Schulz step (Jordan et al. 2024)."""


class BatchedRule(ABC):
    """One optimizer with its state."""

    @abstractmethod
    def update(self, gradient: list[Floats]) -> list[Floats]:
        """Return what one step subtracts, divided by the learning rate."""

    def keep(self, mask: NDArray[np.bool_]) -> None:
        """Drop the state of the runs that the mask (R,) does not mark."""
        for name, value in vars(self).items():
            if isinstance(value, np.ndarray):
                setattr(self, name, value[..., mask])
            elif isinstance(value, list):
                setattr(self, name, [entry[..., mask] for entry in value])


class Descent(BatchedRule):
    """Gradient descent: the update is g."""

    def update(self, gradient: list[Floats]) -> list[Floats]:
        """Return the gradient itself."""
        return gradient


class NormalizedDescent(BatchedRule):
    """Gradient descent of unit length over all parameters."""

    def update(self, gradient: list[Floats]) -> list[Floats]:
        """Return the normalized gradient g/‖g‖₂."""
        squares = sum((g * g).reshape(-1, g.shape[-1]).sum(0) for g in gradient)
        norm = np.sqrt(squares)
        return [g / np.where(norm > 0.0, norm, 1.0) for g in gradient]


class SignDescent(BatchedRule):
    """Steepest descent in the max norm, of unit size."""

    def update(self, gradient: list[Floats]) -> list[Floats]:
        """Return the sign of the gradient."""
        return [np.sign(g) for g in gradient]


class BatchedAdam(BatchedRule):
    """Adam with bias correction; ε is added after it."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        (self.beta1, self.beta2), self.eps = options["betas"], options["eps"]
        self.first: list[Floats] = []
        self.second: list[Floats] = []
        self.count = 0

    def update(self, gradient: list[Floats]) -> list[Floats]:
        """Return M̂/(√V̂ + ε) (arXiv 1412.6980, Algorithm 1)."""
        if not self.first:
            self.first = [np.zeros_like(g) for g in gradient]
            self.second = [np.zeros_like(g) for g in gradient]
        self.count += 1
        bias1, root2 = 1.0 - self.beta1**self.count, (1.0 - self.beta2**self.count) ** 0.5
        out = []
        for first, second, g in zip(self.first, self.second, gradient):
            first += (1.0 - self.beta1) * (g - first)
            second *= self.beta2
            second += (1.0 - self.beta2) * g * g
            out.append((first / bias1) / (np.sqrt(second) / root2 + self.eps))
        return out


class BatchedMatrixRule(BatchedRule):
    """A rule for the hidden matrix [w | b] as one parameter."""

    def update(self, gradient: list[Floats]) -> list[Floats]:
        """Apply `step` to the hidden matrices, (R, k, d + 1)."""
        moved = self.step(np.moveaxis(gradient[0], -1, 0))
        return [np.moveaxis(moved, 0, -1)]

    @abstractmethod
    def step(self, gradient: Floats) -> Floats:
        """Return the update of a stack of matrices (R, m, n)."""

    def keep(self, mask: NDArray[np.bool_]) -> None:
        """Drop state as `BatchedRule.keep` does; matrix rules hold it with the runs first."""
        for name, value in vars(self).items():
            if isinstance(value, np.ndarray):
                setattr(self, name, value[mask])


class SpectralDescent(BatchedMatrixRule):
    """Steepest descent in the spectral norm, of unit size: the exact polar factor of the gradient."""

    def step(self, gradient: Floats) -> Floats:
        """Return U Vᵀ of G = U Σ Vᵀ."""
        return polar(gradient)


class BatchedMuon(BatchedMatrixRule):
    """Muon (`optimizers.rules.muon`), the exact factor or Newton–Schulz in the dtype of the weights."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        self.options = dict(options)
        self.moment: Floats | None = None

    def step(self, gradient: Floats) -> Floats:
        """Return s·α·orth(M), with M the moment looked ahead."""
        direction = self.momentum(gradient)
        if self.options["orthogonalizer"] == "newton_schulz":
            factor = newton_schulz(direction, self.options["orthogonalizer_steps"])
        else:
            factor = polar(direction)
        return factor * (
            update_scale(self.options["update_scale"], gradient.shape[-2:]) * self.options["alpha"]
        )

    def momentum(self, gradient: Floats) -> Floats:
        """Advance the moment, M ← μM + wG, and return what is orthogonalized (wG + μM with look-ahead)."""
        mu, nesterov = self.options["momentum"], self.options["nesterov"]
        weight = 1.0 if self.options["momentum_form"] == "sum" else 1.0 - mu
        before = np.zeros_like(gradient) if self.moment is None else self.moment
        if nesterov == "stored":
            after = mu * mu * before + weight * (1.0 + mu) * gradient
        else:
            after = mu * before + weight * gradient
        self.moment = after
        return weight * gradient + mu * after if nesterov is True else after


class Subspace(BatchedMatrixRule):
    """Common part of SUMO and GaLore: a basis Q of leading singular vectors, renewed at an interval."""

    def __init__(self, options: Mapping[str, Any], shape: tuple[int, int]) -> None:
        m, n = shape
        self.options = dict(options)
        self.left = m >= n if options["side"] == "short" else m < n
        self.rank = options["rank"] or max(1, min(m, n) // 4)
        self.basis: Floats | None = None
        self.count = 0

    def projected(self, gradient: Floats) -> Floats:
        """Renew the basis if it is due, and return Ĝ = QᵀG, (R, r, n), or GQ, (R, m, r)."""
        due = (self.count + self.options["refresh_offset"]) % self.options["refresh_interval"] == 0
        if self.basis is None or due:
            basis = leading(gradient, self.rank, left=self.left)
            if self.basis is not None and self.options["transport"]:
                self.carry(np.swapaxes(basis, -1, -2) @ self.basis)
            self.basis = basis
        self.count += 1
        basis = self.basis
        return np.swapaxes(basis, -1, -2) @ gradient if self.left else gradient @ basis

    def lifted(self, moved: Floats) -> Floats:
        """Return an update in the basis as one of the whole matrix, (R, m, n)."""
        assert self.basis is not None
        return self.basis @ moved if self.left else moved @ np.swapaxes(self.basis, -1, -2)

    def carry(self, overlap: Floats) -> None:
        """Bring moments into the new basis, with overlap = Q_newᵀ Q_old."""


class BatchedSumo(Subspace, BatchedMuon):
    """SUMO (`optimizers.rules.sumo`) with an exact or Newton–Schulz factor."""

    def __init__(self, options: Mapping[str, Any], shape: tuple[int, int]) -> None:
        Subspace.__init__(self, options, shape)
        self.moment: Floats | None = None

    def carry(self, overlap: Floats) -> None:
        """Transport the moment, M ← Q_newᵀ Q_old M (arXiv 2505.24749, Algorithm 1, Block 1.1)."""
        moment = self.moment
        assert moment is not None
        self.moment = overlap @ moment if self.left else moment @ np.swapaxes(overlap, -1, -2)

    def step(self, gradient: Floats) -> Floats:
        """Return α(ρ(G - QĜ) + s·QO), with O the factor of the moment in the subspace."""
        options = self.options
        inside = self.projected(gradient)
        direction = self.momentum(inside)
        if options["orthogonalizer"] == "newton_schulz":
            factor = newton_schulz(direction, options["orthogonalizer_steps"])
        else:
            factor = polar(direction)
        s, rho = (
            update_scale(options["update_scale"], gradient.shape[-2:], self.rank),
            options["residual_scale"],
        )
        return options["alpha"] * (rho * gradient + self.lifted(s * factor - rho * inside))


class BatchedGaLore(Subspace):
    """GaLore (`optimizers.rules.galore`), which carries no moments over."""

    def __init__(self, options: Mapping[str, Any], shape: tuple[int, int]) -> None:
        super().__init__({**options, "transport": False}, shape)
        self.first: Floats | None = None
        self.second: Floats | None = None

    def step(self, gradient: Floats) -> Floats:
        """Return α·Q·(M̂/(√V̂ + ε)), with ε before bias correction for eps_form raw (arXiv 2403.03507, Algorithm 2)."""
        options = self.options
        inside = self.projected(gradient)
        (beta1, beta2), eps = options["betas"], options["eps"]
        if self.first is None or self.second is None:
            self.first, self.second = np.zeros_like(inside), np.zeros_like(inside)
        first = beta1 * self.first + (1.0 - beta1) * inside
        second = beta2 * self.second + (1.0 - beta2) * inside * inside
        self.first, self.second = first, second
        bias1, root2 = 1.0 - beta1**self.count, (1.0 - beta2**self.count) ** 0.5
        floor = eps if options["eps_form"] == "raw" else eps * root2
        moved = first / (np.sqrt(second) + floor) * (root2 / bias1)
        return options["alpha"] * self.lifted(moved)


def has_fast_rule(spec: OptimizerSpec, shape: tuple[int, int], *, train_output: bool) -> bool:
    """Return True if `fast_rule` computes it for hidden matrices of this shape; else the optimizer class has to."""
    options = spec.options
    if spec.kind in ("gd", "ngd", "sign"):
        return True
    if spec.kind == "adamw":
        return options["rounding"] == "nearest"
    if train_output or spec.kind == "plugin":
        return False
    if spec.kind == "spectral":
        return True
    exact = options.get("orthogonalizer", "auto") in (*EXACT_FACTORS, "newton_schulz")
    if spec.kind == "muon":
        return exact
    if spec.kind not in ("sumo", "galore") or not _is_as_published(options, spec.kind):
        return False
    # A sketch that spans the short side finds the exact subspace.
    rank = options["rank"] or max(1, min(shape) // 4)
    spans = options["basis"] == "svd" or rank + OVERSAMPLING >= min(shape)
    is_early = options["decay_order"] == "before" or spec.weight_decay == 0.0
    is_staggered = resolved_stagger(options["refresh_stagger"], [shape])
    plain = is_early and not is_staggered and options.get("refresh_threshold") is None
    unlimited = options.get("norm_growth_limit") is None
    carries = spec.kind == "sumo" or not options["transport"]
    return exact and spans and plain and carries and unlimited


def _is_as_published(options: Mapping[str, Any], kind: str) -> bool:
    """Return True for SUMO or GaLore itself, not for another composition of the low-rank family under its name."""
    inner, residuals = {"sumo": ("orthogonalize", ("sgd", "drop")), "galore": ("adam", ("drop",))}[kind]
    is_known = options["basis"] in ("svd", "randomized") and options["residual"] in residuals
    plain = options["gradient_scaling"] == "none" and not options["error_feedback"]
    return options["inner"] == inner and is_known and plain


def fast_rule(spec: OptimizerSpec, shape: tuple[int, int]) -> BatchedRule:
    """Return the fast rule with fresh state."""
    by_kind: dict[str, Callable[[], BatchedRule]] = {
        "gd": Descent,
        "ngd": NormalizedDescent,
        "sign": SignDescent,
        "spectral": SpectralDescent,
        "adamw": lambda: BatchedAdam(spec.options),
        "muon": lambda: BatchedMuon(spec.options),
        "sumo": lambda: BatchedSumo(spec.options, shape),
        "galore": lambda: BatchedGaLore(spec.options, shape),
    }
    return by_kind[spec.kind]()


def update_scale(name: str, shape: tuple[int, ...], rank: int | None = None) -> float:
    """Return the factor of the option `update_scale` on an orthogonal m×n update."""
    m, n = shape
    return {
        "none": 1.0,
        "rms_max": 0.2 * max(m, n) ** 0.5,
        "rows_cols": max(1.0, m / n) ** 0.5,
        "rms_rank": 0.2 * (m * n / (rank or min(m, n))) ** 0.5,
    }[name]


def polar(matrices: Floats) -> Floats:
    """Return the exact polar factors of (b, m, n), without the directions of σ ≤ max(m, n)·eps·σ1."""
    if matrices.shape[-2:] == (2, 2):
        return _polar_2x2(matrices)
    left, values, right = np.linalg.svd(matrices, full_matrices=False)
    keep = values > max(matrices.shape[-2:]) * np.finfo(matrices.dtype).eps * values[:, :1]
    return (left * keep[:, None, :]) @ right


def _polar_2x2(matrices: Floats) -> Floats:
    """Return (M + sign(det M)·cof M)/(σ1 + σ2), the polar factor of a 2×2 matrix without an SVD."""
    a, b, c, d = (matrices[:, i, j] for i in (0, 1) for j in (0, 1))
    # Entries of 1e-300 have no square.
    top = np.abs(matrices).max((1, 2))
    unit = np.where(top > 0.0, top, 1.0)
    a, b, c, d = a / unit, b / unit, c / unit, d / unit
    determinant = a * d - b * c
    squares = a * a + b * b + c * c + d * d
    sums = np.sqrt(squares + 2.0 * np.abs(determinant))
    largest = 0.5 * (sums + np.sqrt(np.maximum(squares - 2.0 * np.abs(determinant), 0.0)))
    cut = 2.0 * np.finfo(matrices.dtype).eps * largest * largest
    # σ2 = |det|/σ1. One direction alone: u vᵀ = M/σ1.
    sign = np.where(np.abs(determinant) > cut, np.sign(determinant), 0.0)
    size = np.where(sign != 0.0, sums, largest)
    size = np.where(size > 0.0, size, 1.0)
    rows = [a + sign * d, b - sign * c, c - sign * b, d + sign * a]
    return np.stack([row / size for row in rows], axis=-1).reshape(matrices.shape)


def newton_schulz(matrices: Floats, steps: int) -> Floats:
    """Apply `steps` steps aX + bXXᵀX + c(XXᵀ)²X from X = M/max(‖M‖_F, 1e-7)."""
    m, n = matrices.shape[-2:]
    x = np.swapaxes(matrices, -1, -2) if m > n else matrices
    x = x / np.maximum(np.linalg.norm(x, axis=(-2, -1), keepdims=True), 1e-7)
    a, b, c = JORDAN
    for _ in range(steps):
        gram = x @ np.swapaxes(x, -1, -2)
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return np.swapaxes(x, -1, -2) if m > n else x


def leading(matrices: Floats, rank: int, *, left: bool) -> Floats:
    """Return leading singular vectors (b, m or n, rank), largest component positive, zeros below the cut.

    By the Gram matrix of the short side, as `optimizers.linalg.subspace` has it: where two components are
    equal, rounding decides the sign, and a different route rounds differently.
    """
    m, n = matrices.shape[-2:]
    tall = np.swapaxes(matrices, -1, -2) if m < n else matrices
    squares, vectors = np.linalg.eigh(np.swapaxes(tall, -1, -2) @ tall)
    squares = np.maximum(squares[:, ::-1][:, :rank], 0.0)
    vectors = vectors[:, :, ::-1][:, :, :rank]
    cut = max(max(m, n) * float(np.finfo(matrices.dtype).eps), GRAM_RTOL)
    keep = (squares > cut**2 * squares[:, :1])[:, None, :]
    if left == (m >= n):  # the wanted vectors live on the long side
        vectors = tall @ vectors / np.sqrt(np.maximum(squares, np.finfo(matrices.dtype).tiny))[:, None, :]
    vectors = np.where(keep, vectors, 0.0)
    size = np.abs(vectors)
    # Of components that tie to rounding the first decides.
    tied = size >= size.max(1, keepdims=True) * (1.0 - 16.0 * np.finfo(matrices.dtype).eps)
    leader = np.take_along_axis(vectors, tied.argmax(1)[:, None, :], axis=1)
    return np.where(leader < 0.0, -vectors, vectors)
