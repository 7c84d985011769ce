"""(MᵀM)^(-1/2) from the fp64 Gram matrix: by eigh, by four rational steps, or by the polynomials of Newton–Schulz.

The factor is polar(M) = M (MᵀM)^(-1/2). Forming the Gram squares the condition number, so it is formed and
inverted in fp64; then the factor of an fp32 matrix is more accurate than its fp32 SVD up to κ ≈ 1e6.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from optimizers.linalg.newton_schulz import polynomials
from optimizers.linalg.robust import (
    cleaned,
    finite_matrices,
    flattened,
    full_precision,
    robust_eigh,
)

# An fp64 Gram carries noise of about r * eps64 * σ1² on its eigenvalues: below 1e-6 σ1 (r up to 4096) a
# singular value read off it means nothing, so no cut made on a Gram is lower than this.
GRAM_RTOL = 1e-6

# Halley steps that reach down to l hold entries of 1/l in directions that may be empty, whose rounding
# costs eps64/l² everywhere else: 1e-5 keeps that below the error of an fp32 SVD at the same κ.
DWH_RTOL = 1e-5

_EPS32 = torch.finfo(torch.float32).eps
_EPS64 = torch.finfo(torch.float64).eps
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


def inverse_root(gram: Tensor, rtol: float, method: str = "gram", sync: bool | None = None) -> InverseRoot:
    """Return (MᵀM)^(-1/2) of a batch of Gram matrices; directions with σ ≤ rtol·σ1 are dropped.

    "gram": eigendecomposition. "dwh": dynamically weighted Halley iteration on the Gram (Nakatsukasa, Bai and
    Gygi, SIAM J. Matrix Anal. Appl. 31(5), 2010, eq. 3.18 to 3.22, in Gram form): products and Cholesky
    factors only. Each "dwh" result carries a certificate (docs/polar.md); what it does not certify is
    recomputed by "gram" when `sync`, and else passes a smooth spectral filter on the device, without a host
    synchronization.

    A Gram that is not finite gives a zero root, NaN singular values, rank 0, and counts as a fallback; it
    touches no other matrix of the stack. A zero Gram gives a zero root and rank 0 and is not a fallback.

    Args:
        gram: (…, r, r) fp64, symmetric positive semi-definite, MᵀM summed in fp64.
        rtol: cut relative to σ1, on the singular values of M (not on the eigenvalues of the Gram). At least
            `GRAM_RTOL` is used; "dwh" certifies nothing below `DWH_RTOL`.
        method: "gram" or "dwh".
        sync: may the host read the certificate? None: yes on CPU, no elsewhere. "gram" always synchronizes on
            CUDA (torch's eigh reads its own status).

    Raises:
        ValueError: unknown method, `gram` not fp64 or not square.
    """
    if method not in ("gram", "dwh"):
        raise ValueError(f"inverse_root: unknown method {method!r}; known: 'gram', 'dwh'")
    if gram.dtype != torch.float64 or gram.shape[-1] != gram.shape[-2]:
        raise ValueError(f"inverse_root: expects square fp64 matrices, got {tuple(gram.shape)} {gram.dtype}")
    wait = gram.device.type == "cpu" if sync is None else sync
    root, values, rank, fallbacks = _inverse_root(gram.detach(), float(rtol), method, wait)
    return InverseRoot(root, None if method == "dwh" else values, rank, fallbacks)


@torch.library.custom_op("optbench::inverse_root", mutates_args=())
def _inverse_root(
    gram: Tensor, rtol: float, method: str, sync: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    # An operator of its own: a compiled rule keeps one graph across the data-dependent fallbacks in here.
    with full_precision(gram.device.type):
        batch, r = gram.shape[:-2], gram.shape[-1]
        flat = flattened(gram)
        parts = root_by_eigh(flat, rtol) if method == "gram" else root_by_dwh(flat, rtol, sync)
        root, values, rank, fell_back = parts
        return root.view(*batch, r, r), values.view(*batch, r), rank.view(batch), fell_back.sum()


@_inverse_root.register_fake
def _(gram: Tensor, rtol: float, method: str, sync: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
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


def dwh_weights(lower: float) -> tuple[list[tuple[float, float, float]], float]:
    """Return weights (a, b, c) of the Halley steps x(a + bx²)/(1 + cx²) that map [lower, 1] to 1 within 1e-11.

    Returns:
        the steps (4 down to 1e-5, 5 at 1e-6) and 1 - (image of `lower`).
    """
    steps: list[tuple[float, float, float]] = []
    while 1.0 - lower > 1e-11 and len(steps) < 8:
        square = lower * lower
        d = (4.0 * (1.0 - square) / (square * square)) ** (1.0 / 3.0)
        root = math.sqrt(1.0 + d)
        a = root + 0.5 * math.sqrt(8.0 - 4.0 * d + 8.0 * (2.0 - square) / (square * root))
        b = 0.25 * (a - 1.0) ** 2
        c = a + b - 1.0
        steps.append((a, b, c))
        lower = min(1.0, lower * (a + b * square) / (1.0 + c * square))
    return steps, 1.0 - lower


def root_by_dwh(gram: Tensor, rtol: float, sync: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute the inverse root by Halley steps: (b, r, r) → root, NaN values, rank, fell_back (b,) bool."""
    if gram.numel() == 0:
        return _empty_root(gram)
    r = gram.shape[-1]
    cut = max(rtol, DWH_RTOL)
    # Every direction above the cut lies in [cut·σ1/s, 1] after scaling by s = ‖MᵀM‖_F^(1/2) ≤ r^(1/4) σ1.
    steps, _ = dwh_weights(min(cut / r**0.25, 1e-3))
    finite = finite_matrices(gram)
    clean = cleaned(gram, finite)
    scale2 = torch.linalg.matrix_norm(clean)
    present = scale2 > 0
    scale2 = torch.where(present, scale2, 1.0)
    product, residual, deviation, broken = _halley(clean / scale2[:, None, None], steps)
    root = product / scale2.sqrt()[:, None, None]
    bound = torch.linalg.matrix_norm(root @ root).sqrt()  # Schatten-4 norm of the root: at least 1/σ_min
    certified = _certificate(root, bound, scale2, deviation, steps[-1], cut) & ~broken & finite
    if sync:
        root, rank, certified = _redo_by_eigh(clean, root, certified, present, rtol)
    else:
        root, rank = _filtered(root, residual)
    root = torch.where((present & finite)[:, None, None], root, 0.0)
    rank = torch.where(present & finite, rank, 0)
    return root, torch.full_like(gram[..., 0], torch.nan), rank, (present & ~certified) | ~finite


def _symmetric(matrix: Tensor) -> Tensor:
    return 0.5 * (matrix + matrix.mT)


def _halley(start: Tensor, steps: list[tuple[float, float, float]]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run the steps on R = A/s²; return the product, last residual, ‖R-I‖_F before the last step, breakdown."""
    identity = torch.eye(start.shape[-1], dtype=start.dtype, device=start.device)
    residual, product = start, None
    broken = torch.zeros(start.shape[0], dtype=torch.bool, device=start.device)
    deviation = torch.zeros(start.shape[0], dtype=start.dtype, device=start.device)
    for a, b, c in steps:
        deviation = torch.linalg.matrix_norm(residual - identity)
        factor, info = torch.linalg.cholesky_ex(identity + c * residual)
        broken = broken | (info != 0)
        inverse = torch.cholesky_solve(identity.expand_as(factor), factor)
        stage = (b / c) * identity + (a - b / c) * inverse
        product = stage if product is None else _symmetric(product @ stage)
        residual = _symmetric(stage @ residual @ stage)
    assert product is not None
    return product, residual, deviation, broken


def _certificate(
    root: Tensor,
    bound: Tensor,
    scale2: Tensor,
    deviation: Tensor,
    last: tuple[float, float, float],
    cut: float,
) -> Tensor:
    """Return which roots are certified: ‖O - polar(M)‖_F ≤ ‖P MᵀM P - I‖_F for symmetric positive P.

    The first term is the last step's error on the interval its residual allows, the second the rounding
    that the recursion for the residual cannot see. A direction at or below the cut makes the proof void:
    `bound` shows it.
    """
    a, b, c = last
    worst = torch.zeros_like(deviation)
    for sign in (-1.0, 1.0):
        square = (1.0 + sign * deviation).clamp_min(0.0)
        worst = torch.maximum(worst, (1.0 - square.sqrt() * (a + b * square) / (1.0 + c * square)).abs())
    norm2 = torch.linalg.matrix_norm(root).square() * scale2
    error = 2.0 * worst + 4.0 * math.sqrt(root.shape[-1]) * _EPS64 * norm2
    kappa = bound * scale2.sqrt()
    accurate = error <= torch.clamp_min(_EPS32 * kappa, 1e-6)
    return (deviation < 0.5) & accurate & (kappa * cut < 1.0)


def _redo_by_eigh(
    gram: Tensor, root: Tensor, certified: Tensor, present: Tensor, rtol: float
) -> tuple[Tensor, Tensor, Tensor]:
    rank = torch.full_like(certified, gram.shape[-1], dtype=torch.int64)
    again = (present & ~certified).nonzero().squeeze(-1)
    if again.numel() == 0:
        return root, rank, certified
    exact, _, exact_rank, _ = root_by_eigh(gram[again], rtol)
    return root.index_copy(0, again, exact), rank.index_copy(0, again, exact_rank), certified


def _filtered(root: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    """Damp directions that the steps did not map to 1: residual eigenvalues near 1 stay, smaller ones fall to
    0.

    Smoothstep 3x² - 2x³, twice, has derivative 0 at 1: it costs a certified root nothing but its products.
    """
    keep = residual
    for _ in range(2):
        square = keep @ keep
        keep = 3.0 * square - 2.0 * (square @ keep)
    rank = keep.diagonal(dim1=-2, dim2=-1).sum(-1).nan_to_num().round().to(torch.int64)
    return _symmetric(root @ keep).nan_to_num(0.0, 0.0, 0.0), rank


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
