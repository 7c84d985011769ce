"""Matrix functions of the reference rules: polar factor, Newton–Schulz, leading singular vectors. numpy, fp64."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]


def polar(matrix: Matrix) -> Matrix:
    """Return U Vᵀ of the singular value decomposition, over σ > max(m, n)·eps32·σ1.

    The cut is the one for fp32 moments (docs/polar.md): directions below it are rounding noise there.

    Args:
        matrix: (m, n).
    """
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    keep = s > max(matrix.shape) * np.finfo(np.float32).eps * (s[0] if s.size else 0.0)
    return (u * keep) @ vt


def exact_polar(matrix: Matrix) -> Matrix:
    """Return U Vᵀ over all directions of the (m, n) ``matrix``."""
    u, _, vt = np.linalg.svd(matrix, full_matrices=False)
    return u @ vt


def newton_schulz(matrix: Matrix, steps: int = 5) -> Matrix:
    """Return Jordan's quintic iteration X ← aX + (bXXᵀ + c(XXᵀ)²)X from ``matrix`` over its Frobenius norm."""
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / max(np.linalg.norm(x), 1e-7)
    for _ in range(steps):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x


def leading_vectors(matrix: Matrix, rank: int, left: bool) -> Matrix:
    """Return the first ``rank`` left (m, rank) or right (n, rank) singular vectors, largest component positive.

    Singular vectors are defined up to their sign; fixing it makes two implementations comparable. Those of σ below
    max(m, n)·eps32·σ1 are zero: no direction is known there.
    """
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    keep = s > max(matrix.shape) * np.finfo(np.float32).eps * (s[0] if s.size else 0.0)
    basis = ((u if left else vt.T) * keep)[:, :rank]
    largest = np.abs(basis).argmax(axis=0)
    return basis * np.sign(basis[largest, np.arange(rank)])


def eigenvectors(gram: Matrix, shape: tuple[int, int]) -> Matrix:
    """Return the (k, k) eigenvectors of a Gram of an (m, n) matrix, by descending eigenvalue.

    Those at the level of fp32 rounding of the matrix are replaced by unit vectors, made orthonormal to the others.
    """
    values, vectors = np.linalg.eigh(gram)
    values, vectors = values[::-1], vectors[:, ::-1]
    known = values > (max(shape) * np.finfo(np.float32).eps) ** 2 * values[0]
    kept = vectors * known
    rest = np.eye(len(gram)) - kept @ kept.T
    return np.linalg.qr(np.where(known, kept, rest))[0]
