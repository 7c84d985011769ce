"""(MᵀM)^(-1/2) above a sharp cut by Halley steps: products and Cholesky factors only, and nothing that the host reads.

A device computes it without waiting for its host, unlike an eigendecomposition, whose status torch reads. The
dynamically weighted Halley step x ← x(a + bx²)/(1 + cx²) (Y. Nakatsukasa, Z. Bai and F. Gygi, SIAM J. Matrix Anal.
Appl. 31(5), 2010, eq. 3.18 to 3.22) is used twice: for the sign function of the Gram matrix about the cut, which
tells kept from dropped directions, and for the inverse root of what is kept. docs/polar.md has the derivation.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

Weights = tuple[float, float, float]

# Singular values closer to the cut than this, relative to it, are neither kept nor dropped for certain. The fp32
# rounding of a moment moves those at the default cut by about a percent.
BAND = 1e-6

# 2^20 powers leave a relative error of at most ln(r)/2^21 in the largest eigenvalue, also of a cluster (4e-6 for
# r = 4096, half of it in the cut); an eigenvalue 1e-4 below it has no weight left.
_SQUARINGS = 20

_EPS32 = torch.finfo(torch.float32).eps
_EPS64 = torch.finfo(torch.float64).eps


class DwhRoot(NamedTuple):
    """The inverse root of a batch of Gram matrices above a cut, with its proof."""

    root: Tensor  # (b, r, r) symmetric; directions at or below the cut contribute nothing
    rank: Tensor  # (b,) int64: directions above the cut
    certified: Tensor  # (b,) bool: proven to be as accurate as an fp32 SVD, with no direction in doubt


def root_above_cut(gram: Tensor, cut: float) -> DwhRoot:
    """Return (MᵀM)^(-1/2) of a batch, restricted to the directions with σ > cut·σ1.

    With A = MᵀM/σ1²: Π, the projector onto the eigenvalues above cut², comes from `spectral_projector`. A + δ(I - Π),
    with δ between cut² and 1, has no eigenvalue below cut², so that Halley steps with weights known in advance find its
    inverse root, and Π removes from it what δ had lifted.

    Args:
        gram: (b, r, r) fp64, symmetric positive semi-definite, finite. A zero matrix gives a zero root and rank 0.
        cut: relative to σ1, 1e-6 to below 1.
    """
    top = largest_eigenvalue(gram)
    present = top > 0
    scale = torch.where(present, top, 1.0)[:, None, None]
    identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    scaled = gram / scale
    projector, distance, broken = spectral_projector(scaled, cut)
    # 0.1·cut: small enough for the projector's rounding, times δ, not to reach the smallest kept eigenvalue, cut²;
    # large enough for the lifted directions, which hold 1/√δ, to cost no accuracy elsewhere.
    lifted = scaled + max(0.1 * cut, cut * cut) * (identity - projector)
    product, residual, failed = _inverse_root_steps(lifted, cut)
    root = _symmetric(product @ projector)
    rank = projector.diagonal(dim1=-2, dim2=-1).sum(-1).nan_to_num().round().to(torch.int64)
    works = present & ~(broken | failed)
    certified = works & _is_certified(root, residual, distance, rank, cut)
    root = torch.where(works[:, None, None], root / scale.sqrt(), 0.0)
    return DwhRoot(root, torch.where(works, rank, 0), certified | ~present)


def largest_eigenvalue(gram: Tensor) -> Tensor:
    """Return the largest eigenvalue (b,) of positive semi-definite matrices (b, r, r); never above the true one.

    Repeated squaring leaves the eigenvectors of the largest eigenvalue, and the Rayleigh quotient of these in fp64 has
    the square of their error. The squares therefore run in fp32.
    """
    norm = torch.linalg.matrix_norm(gram)
    size = torch.where(norm > 0, norm, 1.0)[:, None, None]
    power = (gram / size).float()
    for _ in range(_SQUARINGS):
        power = power @ power
        norm = torch.linalg.matrix_norm(power)
        power = power / torch.where(norm > 0, norm, 1.0)[:, None, None]
    power = power.double()
    weight = power.square().sum((-2, -1))
    quotient = ((gram @ power) * power).sum((-2, -1))
    return torch.where(weight > 0, quotient / torch.where(weight > 0, weight, 1.0), 0.0)


def spectral_projector(scaled: Tensor, cut: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return the projector onto the eigenvalues above cut² of matrices with eigenvalues in [0, 1].

    Π = (I + sign(B))/2 with B = (A - cut²)(A + cut²)⁻¹. A singular value that is off the cut by a share has an
    eigenvalue of about that share in B; in A - cut² it would be the share times cut², whose square is lost in fp64.

    Returns:
        the projector (b, r, r), a lower bound (b,) of |eigenvalues of B| that is accurate where it is small, and
        (b,) bool: a Cholesky factorization broke down.
    """
    identity = torch.eye(scaled.shape[-1], dtype=scaled.dtype, device=scaled.device)
    inverse, broken = _inverse(scaled + cut * cut * identity)
    sign = _symmetric(identity - 2.0 * cut * cut * inverse)
    distance = torch.zeros_like(scaled[:, 0, 0])
    for index, (a, b, c) in enumerate(dwh_weights(BAND)):
        inverse, failed = _inverse(identity + c * (sign @ sign))
        broken = broken | failed
        if index == 0:
            # An eigenvalue x of B adds 1/(1 + cx²) to the trace, c about 1/BAND^(4/3).
            trace = inverse.diagonal(dim1=-2, dim2=-1).sum(-1)
            distance = ((1.0 / trace - 1.0).clamp_min(0.0) / c).sqrt()
        sign = _symmetric(sign @ ((b / c) * identity + (a - b / c) * inverse))
    return 0.5 * (identity + sign), distance, broken


def dwh_weights(lower: float) -> list[Weights]:
    """Return weights (a, b, c) of the Halley steps that map [lower, 1] to 1 within 1e-10: four down to 1e-6."""
    steps: list[Weights] = []
    while 1.0 - lower > 1e-10 and len(steps) < 8:
        square = lower * lower
        d = (4.0 * (1.0 - square) / (square * square)) ** (1.0 / 3.0)
        root = math.sqrt(1.0 + d)
        a = root + 0.5 * math.sqrt(8.0 - 4.0 * d + 8.0 * (2.0 - square) / (square * root))
        b = 0.25 * (a - 1.0) ** 2
        c = a + b - 1.0
        steps.append((a, b, c))
        lower = min(1.0, lower * (a + b * square) / (1.0 + c * square))
    return steps


def _inverse_root_steps(matrix: Tensor, lower: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return P with P·A·P = I for A with singular values √λ in [lower, 1], ‖P·A·P - I‖_F as tracked, and breakdowns.

    In Gram form: Z = (b/c)I + (a - b/c)(I + cR)⁻¹, P ← PZ, R ← ZRZ from R = A. All are functions of A, so they commute.
    """
    identity = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    residual, product = matrix, identity.expand_as(matrix)
    broken = torch.zeros(matrix.shape[0], dtype=torch.bool, device=matrix.device)
    # At least down to 1e-3: fewer steps would save nothing but certainty.
    for index, (a, b, c) in enumerate(dwh_weights(min(lower, 1e-3))):
        inverse, failed = _inverse(identity + c * residual)
        broken = broken | failed
        stage = (b / c) * identity + (a - b / c) * inverse
        product = _symmetric(product @ stage) if index else stage
        residual = _symmetric(stage @ residual @ stage)
    return product, torch.linalg.matrix_norm(residual - identity), broken


def _inverse(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return the inverses L⁻ᵀL⁻¹ of positive definite matrices (b, r, r), and where Cholesky broke down (b,) bool.

    `cholesky_solve` would do the same, but hands batches on CUDA to MAGMA, one matrix after the other where that is
    missing; a triangular solve goes to cuBLAS, and the product is one batched call.
    """
    factor, info = torch.linalg.cholesky_ex(matrix)
    identity = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    lower = torch.linalg.solve_triangular(factor, identity.expand_as(factor), upper=False)
    return lower.mT @ lower, info != 0


def _symmetric(matrix: Tensor) -> Tensor:
    return 0.5 * (matrix + matrix.mT)


def _is_certified(root: Tensor, residual: Tensor, distance: Tensor, rank: Tensor, cut: float) -> Tensor:
    """Return which roots P of scaled matrices are proven to be accurate.

    ‖O - polar(M)‖_F ≤ ‖P MᵀM P - Π‖_F for O = MP, to first order. That is the tracked residual and a rounding term
    which the recursion cannot see. It may be at most the error of an fp32 SVD, eps32·κ̂, with κ̂ = ‖P²‖_F^(1/2) at
    least the condition number of what is kept. Where directions are dropped, every σ must be farther from the cut
    than the sign function resolves and than fp64 rounding moves it.
    """
    noise = math.sqrt(root.shape[-1]) * _EPS64
    error = 2.0 * residual + 4.0 * noise * torch.linalg.matrix_norm(root).square()
    kappa = torch.linalg.matrix_norm(root @ root).sqrt()
    is_accurate = error <= (_EPS32 * kappa).clamp_min(1e-6)
    is_decided = distance > max(BAND, noise / (cut * cut))
    return is_accurate & ((rank == root.shape[-1]) & (distance > BAND) | is_decided)
