"""Lemma 3.1 of SUMO (arXiv 2505.24749): the first moment of a reversible layer tends to rank one.

With fixed coefficients the gradient of a reversible layer is linear in the weights, G(W) = (1/N) Σ B_i (W - W*) C_i, so
gradient descent gives G(t + 1) = (1 - ηS) G(t), where S is the map on the right. With M(t) = βM(t - 1) + G(t) and the
eigenmatrices V_j of S, the coefficient of V_j in M(t) is g_j (a_j^(t+1) - β^(t+1)) / (a_j - β), a_j = 1 - ηλ_j. Hence
M(t) tends to the direction of V_1, of the smallest eigenvalue, only if a_1 > β; else it tends to the fixed matrix
Σ g_j/(β - a_j) V_j. And V_1 has rank one only if it is b cᵀ, as with N = 1. The lemma states neither condition.
Its factor per step, (max(β, a_2)/a_1)², is a bound: changes of the first direction's own rows and columns cost nothing.

The weights follow plain gradient descent here, as in the lemma, and not SUMO's own update. All numbers are fp64.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

SIDE, STEPS = 16, 800
BETAS = (0.0, 0.9, 0.95)
SMALLEST = (0.01, 0.08, 0.2)
"""ηλ₁; the largest ηλ is 1, so that no direction oscillates."""
TERMS, TERMS_SIDE = 4, 8


@dataclass(frozen=True)
class ReversibleLayer:
    """A layer whose gradient is G(W) = (1/N) Σ B_i (W - W*) C_i, with symmetric positive definite B_i and C_i.

    Attributes:
        left, right: (N, m, m) and (N, n, n), scaled by √η.
        start: (m, n), W - W* at step 0.
    """

    left: Floats
    right: Floats
    start: Floats

    def gradient(self, distance: Floats) -> Floats:
        """Return ηG at W - W* = `distance`, (m, n)."""
        return (self.left @ distance @ self.right).mean(0)

    @cached_property
    def eigen(self) -> tuple[Floats, Floats, Floats]:
        """Return ηλ_j ascending, the eigenmatrices V_j (mn, m, n), and the coefficients g_j of ηG(0)."""
        # Row-major: vec(BXC) = (B ⊗ Cᵀ) vec(X), and C is symmetric.
        s = np.mean([np.kron(b, c) for b, c in zip(self.left, self.right, strict=True)], axis=0)
        values, vectors = np.linalg.eigh(s)
        matrices = vectors.T.reshape(-1, *self.start.shape)
        return values, matrices, np.einsum("jmn,mn->j", matrices, self.gradient(self.start))


def single_term(smallest: float, side: int, seed: int = 0) -> ReversibleLayer:
    """Return a layer with N = 1 whose ηλ are b_i c_j from `smallest` to 1: each eigenmatrix has rank one."""
    generator = np.random.default_rng(seed)
    spectrum = np.geomspace(math.sqrt(smallest), 1.0, side)
    rotations = [np.linalg.qr(generator.normal(size=(side, side)))[0] for _ in range(2)]
    left, right = ((q * spectrum) @ q.T for q in rotations)
    return ReversibleLayer(left[None], right[None], generator.normal(size=(side, side)))


def several_terms(terms: int, side: int, seed: int = 0) -> ReversibleLayer:
    """Return a layer with N terms, whose eigenmatrices have no reason to be of rank one; the largest ηλ is 1."""
    generator = np.random.default_rng(seed)
    roots = generator.normal(size=(2, terms, side, side)) / math.sqrt(side)
    left, right = roots @ roots.swapaxes(-1, -2)
    layer = ReversibleLayer(left, right, generator.normal(size=(side, side)))
    return ReversibleLayer(left / layer.eigen[0][-1], right, layer.start)


def residual_share(moment: Floats) -> float:
    """Return 1 - σ₁²/‖M‖_F² of a matrix (m, n): what its best rank-one approximation leaves out."""
    squares = np.square(np.linalg.svd(moment, compute_uv=False))
    # Not as a difference from 1, which would end at the rounding of 1.
    return float(squares[1:].sum() / squares.sum())


def simulate(layer: ReversibleLayer, beta: float, steps: Collection[int]) -> dict[int, float]:
    """Return t → residual share of M(t) at these steps, by descending step by step."""
    distance, moment = layer.start, np.zeros_like(layer.start)
    shares = {}
    for t in range(max(steps) + 1):
        gradient = layer.gradient(distance)
        moment = beta * moment + gradient
        distance = distance - gradient
        if t in steps:
            shares[t] = residual_share(moment)
    return shares


def weights(a: Floats, beta: float, t: int) -> Floats:
    """Return (a^(t+1) - β^(t+1)) / (a - β) for each a ≥ 0, over max(a_max, β)^t so that nothing underflows."""
    top = max(float(a.max()), beta)
    ratio_a, ratio_b = a / top, beta / top
    difference = a - beta
    close = np.abs(difference) < 1e-9
    safe = np.where(close, 1.0, difference)
    apart = (a * ratio_a**t - beta * ratio_b**t) / safe
    return np.where(close, (t + 1) * ratio_a**t, apart)


def moment_at(layer: ReversibleLayer, beta: float, t: int) -> Floats:
    """Return M(t) in closed form, up to a positive factor."""
    values, matrices, g = layer.eigen
    # Rounding can leave an eigenvalue of 1 + eps, whose power would alternate.
    a = np.maximum(1.0 - values, 0.0)
    return np.tensordot(g * weights(a, beta, t), matrices, 1)


def limit_share(layer: ReversibleLayer, beta: float) -> float:
    """Return what the residual share tends to: that of V_1 if a_1 > β, else that of Σ g_j/(β - a_j) V_j."""
    values, matrices, g = layer.eigen
    a = 1.0 - values
    if a[0] > beta:
        return residual_share(matrices[0])
    return residual_share(np.tensordot(g / (beta - a), matrices, 1))


def decay_per_step(layer: ReversibleLayer, beta: float) -> float:
    """Return (max(β, a_2)/a_1)², the lemma's bound on the residual share's factor per step in the end; 1 if a_1 ≤ β."""
    a = 1.0 - layer.eigen[0][:2]
    return min(1.0, float(max(beta, a[1]) / a[0]) ** 2)


def fitted_decay(layer: ReversibleLayer, beta: float) -> float | None:
    """Return the factor per step of the closed form between shares of about 1e-8 and 1e-12; None if none is predicted.

    It tells the lemma's C⁻² from the share itself, without the eigenvalues.
    """
    predicted = decay_per_step(layer, beta)
    if predicted >= 1.0 or limit_share(layer, beta) > 1e-12:
        return None
    first, last = (round(math.log(share) / math.log(predicted)) for share in (1e-8, 1e-12))
    shares = [residual_share(moment_at(layer, beta, t)) for t in (first, last)]
    return (shares[1] / shares[0]) ** (1.0 / (last - first))


@dataclass(frozen=True)
class RankRow:
    """One simulated setting.

    Attributes:
        layer: which one.
        smallest: ηλ₁.
        beta: decay of the moment.
        holds: 1 - ηλ₁ > β.
        shares: step → residual share.
        limit: what it tends to, in closed form.
        deviation: largest difference of the simulation from the closed form, over the steps that are compared.
        bounded_decay: the lemma's factor per step; 1 where the condition does not hold.
        fitted_decay: the share's factor per step in the end; None where the share does not tend to 0.
        curve: (step, share), thinned.
    """

    layer: str
    smallest: float
    beta: float
    holds: bool
    shares: dict[int, float]
    limit: float
    deviation: float
    bounded_decay: float
    fitted_decay: float | None
    curve: list[tuple[int, float]]


def row(name: str, layer: ReversibleLayer, beta: float, steps: int) -> RankRow:
    """Simulate a setting and compare it with its closed form."""
    shown = sorted({0, 100, steps} & set(range(steps + 1)))
    compared = sorted({0, 1, 2, 5, 10, 30, 100, 300, steps} & set(range(steps + 1)))
    drawn = range(0, steps + 1, max(1, steps // 80))
    simulated = simulate(layer, beta, {*compared, *drawn})
    exact = {t: residual_share(moment_at(layer, beta, t)) for t in compared}
    smallest = float(layer.eigen[0][0])
    return RankRow(
        name,
        smallest,
        beta,
        1.0 - smallest > beta,
        {t: simulated[t] for t in shown},
        limit_share(layer, beta),
        max(abs(simulated[t] - share) for t, share in exact.items()),
        decay_per_step(layer, beta),
        fitted_decay(layer, beta),
        [(t, simulated[t]) for t in drawn],
    )


def rows(
    betas: Sequence[float] = BETAS,
    smallest: Sequence[float] = SMALLEST,
    side: int = SIDE,
    steps: int = STEPS,
) -> list[RankRow]:
    """Return all settings: a single term for each ηλ₁ and β, and several terms for each β."""
    layers = [("one term", single_term(value, side)) for value in smallest]
    layers.append((f"{TERMS} terms", several_terms(TERMS, TERMS_SIDE)))
    return [row(name, layer, beta, steps) for name, layer in layers for beta in betas]
