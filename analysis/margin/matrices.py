"""Polar factors and leading subspaces of stacks of small fp64 matrices, as `optimizers.linalg` defines them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating]

GRAM_RTOL = 1e-6
"""Below this share of σ1 a Gram matrix in fp64 holds no vectors (`optimizers.linalg.inverse_root`)."""
JORDAN = (3.4445, -4.7750, 2.0315)


def polar(matrices: Floats) -> Floats:
    """(b, m, n) → the exact polar factors, without the directions of σ ≤ max(m, n)·eps·σ1."""
    if matrices.shape[-2:] == (2, 2):
        return _polar_2x2(matrices)
    left, values, right = np.linalg.svd(matrices, full_matrices=False)
    keep = values > max(matrices.shape[-2:]) * np.finfo(matrices.dtype).eps * values[:, :1]
    return (left * keep[:, None, :]) @ right


def _polar_2x2(matrices: Floats) -> Floats:
    """(M + sign(det M)·cof M)/(σ1 + σ2): the factor without an SVD."""
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
    """Jordan's quintic, from M/max(‖M‖_F, 1e-7)."""
    m, n = matrices.shape[-2:]
    x = np.swapaxes(matrices, -1, -2) if m > n else matrices
    x = x / np.maximum(np.linalg.norm(x, axis=(-2, -1), keepdims=True), 1e-7)
    a, b, c = JORDAN
    for _ in range(steps):
        gram = x @ np.swapaxes(x, -1, -2)
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return np.swapaxes(x, -1, -2) if m > n else x


def leading(matrices: Floats, rank: int, *, left: bool) -> Floats:
    """(b, m or n, rank): leading singular vectors with the largest component positive, zeros below the cut.

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
