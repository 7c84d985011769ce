"""(MᵀM)^(-1/2) from the fp64 Gram matrix: by eigh, by Halley steps, or by the polynomials of Newton–Schulz.

The factor is polar(M) = M (MᵀM)^(-1/2). Forming the Gram squares the condition number, so it is formed and
inverted in fp64; then the factor of an fp32 matrix is more accurate than its fp32 SVD up to κ ≈ 1e6.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from optimizers.linalg.dwh import root_above_cut
from optimizers.linalg.newton_schulz import polynomials
from optimizers.linalg.robust import (
    GRAM_RTOL,
    cleaned,
    finite_matrices,
    flattened,
    full_precision,
    robust_eigh,
)

_TINY64 = torch.finfo(torch.float64).tiny


class InverseRoot(NamedTuple):
    """What `inverse_root` returns; leading dimensions as the input."""

    root: Tensor  # (…, r, r) fp64, symmetric; directions below the cut contribute nothing
    singular_values: Tensor | None  # (…, r) fp64 of M, descending; None for "dwh"
    effective_rank: Tensor  # (…) int64: directions above the cut
    fallbacks: Tensor  # 0-dim int64


@dataclass(frozen=True)
class RootSolver:
    """A method that turns the Gram matrices of moments into inverse roots, with its settings.

    Attributes:
        method: "gram" or "dwh" (`inverse_root`), or a polynomial ("newton_schulz", "cubic", "polar_express").
        rtol: cut of the exact ones, relative to σ1.
        steps: of the polynomial ones.
        dtype: that the root is applied in, so that it need not travel in a wider one.
    """

    method: str = "gram"
    rtol: float = GRAM_RTOL
    steps: int = 5
    dtype: torch.dtype = torch.float32

    @property
    def gives_singular_values(self) -> bool:
        """Return True if the root comes with singular values."""
        return self.method == "gram"

    def __call__(self, gram: Tensor) -> InverseRoot:
        """Return the roots of (b, r, r) fp64 Grams."""
        if self.method in ("gram", "dwh"):
            return inverse_root(gram, self.rtol, self.method)
        return polynomial_root(gram, self.method, self.steps)


def inverse_root(gram: Tensor, rtol: float, method: str = "gram") -> InverseRoot:
    """Return (MᵀM)^(-1/2) of a batch of Gram matrices; directions with σ ≤ rtol·σ1 are dropped.

    Both methods have the same sharp cut. "gram": eigendecomposition, which synchronizes on CUDA (torch's eigh reads its
    own status). "dwh": products and Cholesky factors only (`linalg.dwh`), without a host read on any device. Each "dwh"
    result carries a certificate (docs/polar.md); `fallbacks` counts those without one.

    A Gram that is not finite gives a zero root, NaN singular values, rank 0, and counts as a fallback; it
    touches no other matrix of the stack. A zero Gram gives a zero root and rank 0 and is not a fallback.

    Args:
        gram: (…, r, r) fp64, symmetric positive semi-definite, MᵀM summed in fp64.
        rtol: cut relative to σ1, on the singular values of M (not on the eigenvalues of the Gram). At least
            `GRAM_RTOL` is used.
        method: "gram" or "dwh".

    Raises:
        ValueError: unknown method, `gram` not fp64 or not square.
    """
    if method not in ("gram", "dwh"):
        raise ValueError(f"inverse_root: unknown method {method!r}; known: 'gram', 'dwh'")
    if gram.dtype != torch.float64 or gram.shape[-1] != gram.shape[-2]:
        raise ValueError(f"inverse_root: expects square fp64 matrices, got {tuple(gram.shape)} {gram.dtype}")
    root, values, rank, fallbacks = _inverse_root(gram.detach(), float(rtol), method)
    return InverseRoot(root, None if method == "dwh" else values, rank, fallbacks)


@torch.library.custom_op("optbench::inverse_root", mutates_args=())
def _inverse_root(gram: Tensor, rtol: float, method: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    # An operator of its own: a compiled rule keeps one graph across the data-dependent fallbacks in here.
    with full_precision(gram.device.type):
        batch, r = gram.shape[:-2], gram.shape[-1]
        flat = flattened(gram)
        parts = root_by_eigh(flat, rtol) if method == "gram" else root_by_dwh(flat, rtol)
        root, values, rank, fell_back = parts
        return root.view(*batch, r, r), values.view(*batch, r), rank.view(batch), fell_back.sum()


@_inverse_root.register_fake
def _(gram: Tensor, rtol: float, method: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        torch.empty_like(gram, memory_format=torch.contiguous_format),
        gram.new_empty(gram.shape[:-1]),
        gram.new_empty(gram.shape[:-2], dtype=torch.int64),
        gram.new_empty((), dtype=torch.int64),
    )


def root_by_eigh(gram: Tensor, rtol: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute the inverse root by eigendecomposition: (b, r, r) → root, singular values, rank, fell_back (b,) bool."""
    if gram.numel() == 0:
        return _empty_root(gram)
    finite = finite_matrices(gram)
    values, vectors, rescued = robust_eigh(cleaned(gram, finite))
    cut = max(rtol, GRAM_RTOL) ** 2
    keep = values > cut * values[:, -1:].clamp_min(0.0)
    weights = torch.where(keep, values.clamp_min(_TINY64).rsqrt(), 0.0)
    root = (vectors * weights[:, None, :]) @ vectors.mT
    singular = values.clamp_min(0.0).sqrt().flip(-1)
    singular = torch.where(finite[:, None], singular, torch.nan)
    return root, singular, keep.sum(-1), rescued | ~finite


def _empty_root(gram: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    count = gram.shape[0]
    rank = torch.zeros(count, dtype=torch.int64, device=gram.device)
    return torch.zeros_like(gram), gram.new_zeros(gram.shape[:-1]), rank, rank.bool()


def root_by_dwh(gram: Tensor, rtol: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute the inverse root by Halley steps: (b, r, r) → root, NaN values, rank, fell_back (b,) bool."""
    if gram.numel() == 0:
        return _empty_root(gram)
    finite = finite_matrices(gram)
    root, rank, certified = root_above_cut(cleaned(gram, finite), max(rtol, GRAM_RTOL))
    # A matrix that is not finite became a zero matrix, which has a zero root.
    return root, torch.full_like(gram[..., 0], torch.nan), rank, ~(certified & finite)


def polynomial_root(gram: Tensor, method: str, steps: int, eps: float = 1e-7) -> InverseRoot:
    """Return P with M·P = what `method` makes of M, from MᵀM alone: for moments of which each rank holds some rows.

    With A = XᵀX every step X ← X(aI + bA + cA²) = XW is A ← WAW and P ← PW: W is a polynomial of A, so they
    commute. In fp64 throughout: the result differs from an iteration on M by that iteration's own rounding.

    Args:
        gram: (b, r, r) fp64, MᵀM.
        method: "newton_schulz", "cubic" or "polar_express", with the defaults of these functions.
        steps: number of polynomials.
        eps: floor of ‖M‖_F.

    Returns:
        As `inverse_root`, without singular values; a Gram that is not finite gives zeros and counts as a
        fallback.
    """
    safety = 1.01 if method == "polar_express" else 1.0
    finite = torch.isfinite(gram).flatten(1).all(-1)
    clean = torch.where(finite[:, None, None], gram, 0.0)
    identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    norm = clean.diagonal(dim1=-2, dim2=-1).sum(-1).sqrt()[:, None, None] * safety
    norm = norm.clamp_min(eps)
    squared, root = clean / norm.square(), identity / norm
    for a, b, c in polynomials(method, steps, safety):
        factor = a * identity + b * squared + c * (squared @ squared)
        squared, root = factor @ squared @ factor, root @ factor
    root = torch.where(finite[:, None, None], root, 0.0)
    rank = torch.where(finite, gram.shape[-1], 0)
    return InverseRoot(root, None, rank, (~finite).sum())
