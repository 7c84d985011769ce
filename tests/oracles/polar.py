"""Independent oracles for polar factors: numpy and scipy in fp64, and the scalar theory of the iterations."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import scipy.linalg
from numpy.typing import NDArray

Array = NDArray[np.float64]


def haar(rows: int, columns: int, rng: np.random.Generator) -> Array:
    """Orthonormal columns (rows, columns), uniformly distributed."""
    q, r = np.linalg.qr(rng.standard_normal((rows, columns)))
    return q * np.sign(np.diag(r))


def with_spectrum(sigma: Sequence[float] | Array, m: int, n: int, seed: int) -> tuple[Array, Array]:
    """An m×n fp64 matrix with these singular values, and its polar factor U Vᵀ over the non-zero ones."""
    rng = np.random.default_rng(seed)
    values = np.asarray(sigma, dtype=np.float64)
    left, right = haar(m, len(values), rng), haar(n, len(values), rng)
    return (left * values) @ right.T, left[:, values > 0] @ right[:, values > 0].T


def polar_by_svd(matrix: Array, rtol: float = 0.0) -> tuple[Array, int]:
    """Polar factor by numpy's fp64 SVD over σ > rtol·σ1, and how many those are."""
    left, values, right = np.linalg.svd(np.asarray(matrix, dtype=np.float64), full_matrices=False)
    keep = values > rtol * values[0]
    return left[:, keep] @ right[keep], int(keep.sum())


def polar_by_scipy(matrix: Array) -> Array:
    """Polar factor by `scipy.linalg.polar` (full-rank matrices)."""
    tall = matrix.shape[0] >= matrix.shape[1]
    factor = scipy.linalg.polar(np.asarray(matrix, dtype=np.float64), side="right" if tall else "left")[0]
    return np.asarray(factor, dtype=np.float64)


def scalar_map(x: Array, coefficients: Sequence[float] | Array, steps: int) -> Array:
    """What `steps` steps of ax + bx³ + cx⁵ make of singular values x."""
    a, b, c = coefficients
    for _ in range(steps):
        x = a * x + b * x**3 + c * x**5
    return x


def lemma_bound(kappa: float, steps: int) -> float:
    """Bound of SUMO's Lemma 3.2 on ‖E_i‖₂, (1 - 1/κ(AAᵀ))^(2^i), for κ(A) = kappa (arXiv 2505.24749)."""
    return (1.0 - 1.0 / kappa**2) ** (2.0**steps)


def minimax_quintic(lower: float, upper: float) -> Array:
    """(a, b, c) of the odd quintic closest to 1 on [lower, upper] in the maximum norm, by Remez exchange."""
    inner = np.array([0.75 * lower + 0.25 * upper, 0.25 * lower + 0.75 * upper])
    row = np.zeros(3)
    for _ in range(200):
        points = np.array([lower, *inner, upper])
        # p(x_i) + (-1)^i E = 1 at four alternating points: the three coefficients and the error E.
        system = np.stack([points, points**3, points**5, np.array([1.0, -1.0, 1.0, -1.0])], axis=1)
        row = np.linalg.solve(system, np.ones(4))[:3]
        a, b, c = row
        root = np.sqrt(9.0 * b * b - 20.0 * a * c)
        extrema = np.sqrt(np.array([-3.0 * b - root, -3.0 * b + root]) / (10.0 * c))
        if np.allclose(extrema, inner, rtol=1e-15, atol=0.0):
            break
        inner = extrema
    return np.asarray(row, dtype=np.float64)


def polar_express_table(lower: float, steps: int, cushion: float) -> Array:
    """Composed minimax quintics from [lower, 1] (Polar Express, arXiv 2505.16932, Algorithm 2), (steps, 3).

    The interval's lower end is not taken below `cushion` times its upper end; the polynomial is then rescaled
    so that
    the images of both true ends lie around 1.
    """
    low, high, rows = lower, 1.0, []
    for _ in range(steps):
        row = minimax_quintic(max(low, cushion * high), high)
        if cushion * high > low:
            row = row * 2.0 / (scalar_map(np.array([low, high]), row, 1).sum())
        rows.append(row)
        low = float(scalar_map(np.array([low]), row, 1)[0])
        high = 2.0 - low
    return np.array(rows)


def rounded_to_bits(x: Array, bits: int) -> Array:
    """x with `bits` explicit mantissa bits, to nearest: 10 is TF32, 7 is bf16."""
    mantissa, exponent = np.frexp(x)
    return np.ldexp(np.round(mantissa * 2.0 ** (bits + 1)) / 2.0 ** (bits + 1), exponent)
