"""Orthonormal bases of a gradient's leading singular subspace: exact, or by a randomized range finder.

Bases carry canonical signs. Where a moment is reused in a new basis without transport, the next steps
depend on the arbitrary signs of singular vectors, so they are fixed here, once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from optimizers.linalg import sketching
from optimizers.linalg.inverse_root import GRAM_RTOL
from optimizers.linalg.requests import answer_alone, drive
from optimizers.linalg.robust import (
    cleaned,
    default_rtol,
    finite_matrices,
    flattened,
    full_precision,
    robust_eigh,
)


def canonical_signs(basis: Tensor) -> Tensor:
    """Flip columns so that the component of largest absolute value is positive.

    Of components that tie within 16 eps the one with the lowest index decides, so that rounding does not.
    Zero columns stay zero.

    Args:
        basis: (…, n, r).
    """
    if basis.shape[-2] == 0:
        return basis
    size = basis.abs()
    top = size.amax(-2, keepdim=True)
    tied = size >= top * (1.0 - 16.0 * torch.finfo(basis.dtype).eps)
    index = torch.arange(basis.shape[-2], device=basis.device)[:, None]
    first = torch.where(tied, index, basis.shape[-2]).amin(-2, keepdim=True)
    # A column that holds NaN ties nowhere; it stays what it is.
    leader = basis.gather(-2, first.clamp_max(basis.shape[-2] - 1))
    return torch.where(leader < 0, -basis, basis)


def test_matrix(seed: int, name: str, refresh: int, shape: tuple[int, ...]) -> Tensor:
    """Return a Gaussian sketch that depends on (seed, name, refresh) alone, not on a generator's state or
    device.

    Args:
        seed: of the run.
        name: of the parameter.
        refresh: number of the refresh.
        shape: (columns of the stored weight, rank + oversampling).

    Returns:
        fp32 on the CPU; `randomized_basis` moves it.
    """
    digest = hashlib.sha256(f"{seed}/{name}/{refresh}".encode()).digest()
    generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.randn(shape, generator=generator, dtype=torch.float32)


# Pytest collects functions by this prefix wherever they are imported.
test_matrix.__test__ = False  # type: ignore[attr-defined]


def svd_basis(gradient: Tensor, rank: int, side: str, rtol: float | None = None) -> Tensor:
    """Return the leading `rank` singular vectors of a gradient: exact, canonical signs, zeros below the cut.

    Through the fp64 Gram of the short side, whose eigenvectors are those vectors; never raises on data. A
    matrix that is not finite gets a zero basis.

    Args:
        gradient: (…, m, n).
        rank: number of vectors, at most min(m, n).
        side: "left" → (…, m, rank), "right" → (…, n, rank).
        rtol: cut relative to σ1; None: max(m, n)·eps. Not lower than `GRAM_RTOL`.

    Returns:
        fp32 (fp64 for fp64 input), orthonormal columns in order of descending σ; columns below the cut are
        zero.

    Raises:
        ValueError: rank outside 1 … min(m, n), or an unknown side.
    """
    _check(gradient, rank, side)
    return _svd_basis(
        gradient.detach(), rank, side == "left", basis_cut(gradient.shape, gradient.dtype, rtol)
    )


def basis_cut(shape: Sequence[int], dtype: torch.dtype, rtol: float | None = None) -> float:
    """Return the relative cut of a basis of (…, m, n) gradients: `rtol` or max(m, n)·eps, at least `GRAM_RTOL`."""
    return max(default_rtol(tuple(shape), dtype) if rtol is None else rtol, GRAM_RTOL)


def _check(gradient: Tensor, rank: int, side: str) -> None:
    if side not in ("left", "right"):
        raise ValueError(f"side must be 'left' or 'right', got {side!r}")
    if not 1 <= rank <= min(gradient.shape[-2:]):
        raise ValueError(f"rank {rank} does not fit a matrix of shape {tuple(gradient.shape[-2:])}")


def _basis_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


@torch.library.custom_op("optbench::svd_basis", mutates_args=())
def _svd_basis(gradient: Tensor, rank: int, left: bool, rtol: float) -> Tensor:
    with full_precision(gradient.device.type):
        m, n = gradient.shape[-2:]
        flat = flattened(gradient).double()
        flat = cleaned(flat, finite_matrices(flat))
        tall = flat.mT if m < n else flat
        values, vectors = _leading(tall.mT @ tall, rank)
        keep = (values > rtol**2 * values[:, :1])[:, None, :]
        if left == (m >= n):  # the wanted vectors live on the long side
            size = values.clamp_min(torch.finfo(values.dtype).tiny).sqrt()[:, None, :]
            vectors = tall @ vectors / size
        vectors = torch.where(keep, vectors, 0.0).to(_basis_dtype(gradient.dtype))
        return canonical_signs(vectors).reshape(*gradient.shape[:-2], m if left else n, rank).contiguous()


@_svd_basis.register_fake
def _(gradient: Tensor, rank: int, left: bool, rtol: float) -> Tensor:
    side = gradient.shape[-2 if left else -1]
    return gradient.new_empty(*gradient.shape[:-2], side, rank, dtype=_basis_dtype(gradient.dtype))


def _leading(gram: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return the largest `rank` eigenvalues, descending and not negative, and their vectors."""
    values, vectors, _ = robust_eigh(gram)
    return values.flip(-1)[:, :rank].clamp_min(0.0), vectors.flip(-1)[:, :, :rank]


def randomized_basis(
    gradient: Tensor,
    rank: int,
    side: str,
    test: Tensor,
    passes: int = 1,
    warm: Tensor | None = None,
    rtol: float | None = None,
    canonical: bool = True,
) -> Tensor:
    """Compute leading singular vectors by a randomized range finder with power passes and a warm start.

    N. Halko, P. Martinsson and J. Tropp, SIAM Review 53(2), 2011, Algorithms 4.4 and 5.1; orthonormalized by
    CholeskyQR2 on fp64 Grams (Y. Yamamoto et al., ETNA 44, 2015), by eigenvalues where that breaks down. A
    rank-deficient sketch yields exact zero columns, not arbitrary directions. The algorithm itself is
    `sketching.range_finder`, which also runs on shards.

    Never raises on data: a matrix that is not finite gets a zero basis, and no other of the stack notices.

    Args:
        gradient: (…, m, n).
        rank: at most min(m, n).
        side: "left" → (…, m, rank), "right" → (…, n, rank).
        test: (…, n, rank + oversampling) Gaussian (`test_matrix`), broadcast over the stack.
        passes: how often the sketch is multiplied by the gradient and back. "left" starts from one product
            with the gradient and may have 0 passes; "right" needs 1.
        warm: previous basis on the same side; its non-zero columns replace the first `rank` directions of
            the sketch.
        rtol: cut relative to σ1; None: max(m, n)·eps.
        canonical: fix the signs.

    Returns:
        fp32 (fp64 for fp64 input), orthonormal columns in order of descending (Ritz) σ, zero below the cut.
        How much energy it captures: docs/polar.md.

    Raises:
        ValueError: unknown side, rank or passes out of range, or a test matrix that does not fit.
    """
    if side not in ("left", "right"):
        raise ValueError(f"side must be 'left' or 'right', got {side!r}")
    if passes < (0 if side == "left" else 1):
        raise ValueError(f"side {side!r} needs more passes than {passes}")
    n = gradient.shape[-1]
    if test.shape[-2] != n or not 1 <= rank <= test.shape[-1] or rank > n:
        raise ValueError(
            f"rank {rank} and a test matrix {tuple(test.shape)} do not fit a gradient {tuple(gradient.shape)}"
        )
    batch = gradient.shape[:-2]
    with torch.no_grad(), full_precision(gradient.device.type):
        g = flattened(gradient.detach().to(_basis_dtype(gradient.dtype)))
        sketch = flattened(test.to(g).expand(*batch, *test.shape[-2:]))
        old = None if warm is None else flattened(warm.to(g))
        finder = sketching.range_finder(g, rank, side, sketch, passes, old, basis_cut(g.shape, g.dtype, rtol))
        basis = drive(finder, answer_alone)
        basis = canonical_signs(basis) if canonical else basis
        return basis.reshape(*batch, *basis.shape[-2:])
