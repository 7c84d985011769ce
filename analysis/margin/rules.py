"""Update rules in plain numpy for many small nets at once: what they subtract from the weights, over lr.

The rules of `optimizers` computed again without torch, whose step costs more than a million times the
arithmetic of a net of six numbers. tests/analysis/margin/test_rules.py holds each of them to the real class over
10,000 steps. A gradient is a list: hidden (k, d + 1, R), then output (k, R) where v is trained.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from analysis.margin.matrices import leading, newton_schulz, polar

Floats = NDArray[np.floating]


class Rule(ABC):
    """One optimizer with its state."""

    matrix_only = False
    """It has a rule for the hidden matrix alone, so that v has to stay fixed."""

    @abstractmethod
    def update(self, gradient: list[Floats]) -> list[Floats]:
        """What one step subtracts, divided by the learning rate."""

    def keep(self, mask: NDArray[np.bool_]) -> None:
        """Forget the runs that the mask (R,) does not mark."""
        for name, value in vars(self).items():
            if isinstance(value, np.ndarray):
                setattr(self, name, value[..., mask])
            elif isinstance(value, list):
                setattr(self, name, [entry[..., mask] for entry in value])


class Descent(Rule):
    """Gradient descent."""

    def update(self, gradient: list[Floats]) -> list[Floats]:
        """g."""
        return gradient


class NormalizedDescent(Rule):
    """Gradient descent of unit length over all parameters."""

    def update(self, gradient: list[Floats]) -> list[Floats]:
        """g/‖g‖₂."""
        squares = sum((g * g).reshape(-1, g.shape[-1]).sum(0) for g in gradient)
        norm = np.sqrt(squares)
        return [g / np.where(norm > 0.0, norm, 1.0) for g in gradient]


class SignDescent(Rule):
    """Steepest descent in the max norm, of unit size."""

    def update(self, gradient: list[Floats]) -> list[Floats]:
        """sign g."""
        return [np.sign(g) for g in gradient]


class Adam(Rule):
    """Adam with bias correction; ε is added after it."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        (self.beta1, self.beta2), self.eps = options["betas"], options["eps"]
        self.first: list[Floats] = []
        self.second: list[Floats] = []
        self.count = 0

    def update(self, gradient: list[Floats]) -> list[Floats]:
        """M̂/(√V̂ + ε)."""
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


class MatrixRule(Rule):
    """A rule for the hidden matrix [w | b] as one parameter."""

    matrix_only = True

    def update(self, gradient: list[Floats]) -> list[Floats]:
        """`step` on (R, k, d + 1)."""
        moved = self.step(np.moveaxis(gradient[0], -1, 0))
        return [np.moveaxis(moved, 0, -1)]

    @abstractmethod
    def step(self, gradient: Floats) -> Floats:
        """The update of a stack (R, m, n)."""

    def keep(self, mask: NDArray[np.bool_]) -> None:
        """State of matrix rules has the runs first."""
        for name, value in vars(self).items():
            if isinstance(value, np.ndarray):
                setattr(self, name, value[mask])


class SpectralDescent(MatrixRule):
    """Steepest descent in the spectral norm, of unit size: the exact polar factor of the gradient."""

    def step(self, gradient: Floats) -> Floats:
        """U Vᵀ."""
        return polar(gradient)


class Muon(MatrixRule):
    """Muon (`optimizers.rules.muon`), the exact factor or Newton–Schulz in the dtype of the weights."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        self.options = dict(options)
        self.moment: Floats | None = None

    def step(self, gradient: Floats) -> Floats:
        """s·α·orth(look-ahead of the moment)."""
        direction = self.momentum(gradient)
        if self.options["orthogonalizer"] == "newton_schulz":
            factor = newton_schulz(direction, self.options["orthogonalizer_steps"])
        else:
            factor = polar(direction)
        return factor * (scale(self.options["update_scale"], gradient.shape[-2:]) * self.options["alpha"])

    def momentum(self, gradient: Floats) -> Floats:
        """Advance the moment (`optimizers.rules.orthogonalize.momentum`); returns what is orthogonalized."""
        mu, nesterov = self.options["momentum"], self.options["nesterov"]
        weight = 1.0 if self.options["momentum_form"] == "sum" else 1.0 - mu
        before = np.zeros_like(gradient) if self.moment is None else self.moment
        if nesterov == "stored":
            after = mu * mu * before + weight * (1.0 + mu) * gradient
        else:
            after = mu * before + weight * gradient
        self.moment = after
        return weight * gradient + mu * after if nesterov is True else after


class Subspace(MatrixRule):
    """What SUMO and GaLore share: a basis of leading singular vectors, renewed at an interval."""

    def __init__(self, options: Mapping[str, Any], shape: tuple[int, int]) -> None:
        m, n = shape
        self.options = dict(options)
        self.left = m >= n if options["side"] == "short" else m < n
        self.rank = options["rank"] or max(1, min(m, n) // 4)
        self.basis: Floats | None = None
        self.count = 0

    def projected(self, gradient: Floats) -> Floats:
        """Renew the basis if it is due; the gradient in it: (R, r, n) or (R, m, r)."""
        due = (self.count + self.options["refresh_offset"]) % self.options["refresh_interval"] == 0
        if self.basis is None or due:
            new = leading(gradient, self.rank, left=self.left)
            if self.basis is not None and self.options["transport"]:
                self.carry(np.swapaxes(new, -1, -2) @ self.basis)
            self.basis = new
        self.count += 1
        basis = self.basis
        return np.swapaxes(basis, -1, -2) @ gradient if self.left else gradient @ basis

    def lifted(self, moved: Floats) -> Floats:
        """Back to (R, m, n)."""
        assert self.basis is not None
        return self.basis @ moved if self.left else moved @ np.swapaxes(self.basis, -1, -2)

    def carry(self, overlap: Floats) -> None:
        """Bring moments into the new basis; overlap = Q_newᵀ Q_old."""


class Sumo(Subspace, Muon):
    """SUMO (`optimizers.rules.sumo`) with an exact or Newton–Schulz factor."""

    def __init__(self, options: Mapping[str, Any], shape: tuple[int, int]) -> None:
        Subspace.__init__(self, options, shape)
        self.moment: Floats | None = None

    def carry(self, overlap: Floats) -> None:
        """M ← R M."""
        moment = self.moment
        assert moment is not None
        self.moment = overlap @ moment if self.left else moment @ np.swapaxes(overlap, -1, -2)

    def step(self, gradient: Floats) -> Floats:
        """α(ρ(G - QĜ) + s·QO)."""
        options = self.options
        inside = self.projected(gradient)
        direction = self.momentum(inside)
        if options["orthogonalizer"] == "newton_schulz":
            factor = newton_schulz(direction, options["orthogonalizer_steps"])
        else:
            factor = polar(direction)
        s, rho = scale(options["update_scale"], gradient.shape[-2:], self.rank), options["residual_scale"]
        return options["alpha"] * (rho * gradient + self.lifted(s * factor - rho * inside))


class GaLore(Subspace):
    """GaLore (`optimizers.rules.galore`), which carries no moments over."""

    def __init__(self, options: Mapping[str, Any], shape: tuple[int, int]) -> None:
        super().__init__({**options, "transport": False}, shape)
        self.first: Floats | None = None
        self.second: Floats | None = None

    def step(self, gradient: Floats) -> Floats:
        """α·Q·(M̂/(√V̂ + ε)), with ε before bias correction for eps_form raw."""
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


def scale(name: str, shape: tuple[int, ...], rank: int | None = None) -> float:
    """The factor `update_scale` on an orthogonal m×n update (`optimizers.rules.orthogonalize.scale`)."""
    m, n = shape
    return {
        "none": 1.0,
        "rms_max": 0.2 * max(m, n) ** 0.5,
        "rows_cols": max(1.0, m / n) ** 0.5,
        "rms_rank": 0.2 * (m * n / (rank or min(m, n))) ** 0.5,
    }[name]
