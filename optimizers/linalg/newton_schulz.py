"""Odd matrix polynomials that push singular values towards 1: Muon's quintic, the cubic, Polar Express.

All are approximations of the polar factor; `optimizers.linalg.polar` has the exact methods.
"""

from __future__ import annotations

import torch
from torch import Tensor

from optimizers.linalg.robust import (
    flattened,
    full_precision,
    multiplies,
)

Coefficients = tuple[float, float, float]

# K. Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024.
JORDAN: Coefficients = (3.4445, -4.7750, 2.0315)
# The Newton-Schulz polynomial of degree 3 (Higham, "Functions of Matrices", 2008, eq. 8.20).
CUBIC: Coefficients = (1.5, -0.5, 0.0)
# The Taylor polynomial of degree 5 at 1: the limit of the Polar Express steps.
TAYLOR: Coefficients = (1.875, -1.25, 0.375)
# N. Amsel, D. Persson, C. Musco and R. Gower, "The Polar Express", arXiv 2505.16932, Algorithm 1: composed
# minimax quintics for [1e-3, 1] with cushion 0.02407327424182761; later steps are the Taylor polynomial.
POLAR_EXPRESS: tuple[Coefficients, ...] = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
    TAYLOR,
)


def newton_schulz(
    matrix: Tensor,
    steps: int = 5,
    coefficients: Coefficients = JORDAN,
    dtype: torch.dtype = torch.bfloat16,
    eps: float = 1e-7,
) -> Tensor:
    """Apply Muon's orthogonalization: `steps` times X ← aX + (bA + cA²)X, A = XXᵀ, from X = M/max(‖M‖_F, eps).

    With `JORDAN` and 5 steps singular values of 0.01 to 1 (relative to ‖M‖_F) land in [0.68, 1.14]; it does
    not converge to the polar factor. Rounding to `dtype` comes first, then the norm, as in
    `torch.optim.Muon`.

    Args:
        matrix: (…, m, n), any floating dtype.
        dtype: in which the products run.
        eps: floor of the norm: a zero matrix stays zero.

    Returns:
        (…, m, n), dtype of `matrix`. NaN and Inf stay in the matrix that held them.

    Raises:
        ValueError: fewer than two dimensions, or negative steps.
    """
    return _run(matrix, [coefficients] * _checked(steps), dtype, eps, 1.0)


def cubic(
    matrix: Tensor,
    steps: int = 5,
    dtype: torch.dtype = torch.float32,
    norm: str = "frobenius",
    eps: float = 1e-7,
) -> Tensor:
    """Apply the cubic Newton-Schulz X ← (3X - XXᵀX)/2.

    It converges to the polar factor, slowly if κ is large.

    Args:
        matrix: (…, m, n).
        dtype: in which the products run.
        norm: first scaling, "frobenius" or "spectral". The bound of SUMO's Lemma 3.2 (arXiv 2505.24749),
            ‖E_i‖₂ ≤ (1 - 1/κ²)^(2^i), holds with "spectral" only; that norm costs an SVD.
        eps: floor of the norm.

    Raises:
        ValueError: unknown norm, fewer than two dimensions, negative steps.
    """
    if norm not in ("frobenius", "spectral"):
        raise ValueError(f"cubic: norm must be 'frobenius' or 'spectral', got {norm!r}")
    table = [CUBIC] * _checked(steps)
    if norm == "frobenius":
        return _run(matrix, table, dtype, eps, 1.0)
    with full_precision(matrix.device.type):
        largest = torch.linalg.matrix_norm(matrix.to(torch.float64), ord=2, keepdim=True)
    scaled = matrix.to(torch.float64) / largest.clamp_min(eps)
    return _run(scaled.to(dtype), table, dtype, 0.0, 0.0).to(matrix.dtype)


def polar_express(
    matrix: Tensor,
    steps: int = 5,
    dtype: torch.dtype = torch.bfloat16,
    safety: float = 1.01,
    eps: float = 1e-7,
) -> Tensor:
    """Apply Polar Express (arXiv 2505.16932, Algorithm 1): the composed minimax quintics of `POLAR_EXPRESS`.

    Args:
        matrix: (…, m, n).
        steps: 5 as in the paper's Muon; 8 reach fp32 accuracy for κ up to about 1e2. Beyond the table the
            Taylor polynomial repeats.
        dtype: in which the products run.
        safety: factor on ‖M‖_F and on the argument of every polynomial but the Taylor one, against rounding
            in bf16 pushing singular values over 1 (section 3.4 of the paper).
        eps: floor of the norm.

    Raises:
        ValueError: fewer than two dimensions, or negative steps.
    """
    return _run(matrix, _express(steps, safety), dtype, eps, safety)


def _express(steps: int, safety: float) -> list[Coefficients]:
    table = [POLAR_EXPRESS[min(i, len(POLAR_EXPRESS) - 1)] for i in range(_checked(steps))]
    return [
        row if row == TAYLOR else (row[0] / safety, row[1] / safety**3, row[2] / safety**5) for row in table
    ]


def polynomials(method: str, steps: int, safety: float) -> list[Coefficients]:
    """Return the coefficients of each step of "newton_schulz", "cubic" or "polar_express"."""
    if method == "polar_express":
        return _express(steps, safety)
    return [{"newton_schulz": JORDAN, "cubic": CUBIC}[method]] * _checked(steps)


def _checked(steps: int) -> int:
    if steps < 0:
        raise ValueError(f"steps must not be negative, got {steps}")
    return steps


def _run(matrix: Tensor, table: list[Coefficients], dtype: torch.dtype, eps: float, safety: float) -> Tensor:
    if matrix.ndim < 2:
        raise ValueError(f"expects matrices (…, m, n), got shape {tuple(matrix.shape)}")
    flat = [value for row in table for value in row]
    return _odd_polynomials(matrix.detach(), flat, dtype, eps, safety)


@torch.library.custom_op("optbench::odd_polynomials", mutates_args=())
def _odd_polynomials(
    matrix: Tensor, coefficients: list[float], dtype: torch.dtype, eps: float, safety: float
) -> Tensor:
    # An operator of its own, so that the precision guard also holds inside a compiled rule. The work is
    # products with fused epilogues: nothing is left for a compiler to fuse.
    with full_precision(matrix.device.type):
        m, n = matrix.shape[-2:]
        x = flattened(matrix)
        x = (x.mT if m > n else x).to(dtype)
        if safety > 0.0:
            x = x / (torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True) * safety).clamp_min(eps)
        result = torch.empty(matrix.shape, dtype=matrix.dtype, device=matrix.device)
        # A CPU takes one matrix after the other, which stays in its cache for all steps; a GPU wants few launches.
        size = 1 if x.device.type == "cpu" else max(1, len(x))
        for slot, part in zip(flattened(result).split(size), x.split(size)):
            factor = _iterate(part, coefficients)
            slot.copy_(factor.mT if m > n else factor)
        return result


def _iterate(x: Tensor, coefficients: list[float]) -> Tensor:
    """Apply the polynomials to matrices (b, m, n) that are scaled; products round to the dtype of x."""
    dtype, emulated = x.dtype, _emulates(x)
    x = x.float() if emulated else x
    for i in range(0, len(coefficients), 3):
        a, b, c = coefficients[i : i + 3]
        gram = _rounded(torch.bmm(x, x.mT), dtype, emulated)
        if c != 0.0:
            gram = _rounded(torch.baddbmm(gram, gram, gram, beta=b, alpha=c), dtype, emulated)
        x = torch.baddbmm(x, gram, x, beta=a, alpha=1.0 if c != 0.0 else b)
        x = _rounded(x, dtype, emulated)
    return x


def _emulates(x: Tensor) -> bool:
    """Return True if half-precision products run as fp32 products of the same rounded numbers, rounded after
    each.

    A bf16 product accumulates in fp32 and rounds once, so this is the same arithmetic; CPUs without bf16
    units do it 18 times faster (56 matrices of 512×128, one AVX2 thread).
    """
    return not multiplies(x.dtype, x.device.type)


def _rounded(x: Tensor, dtype: torch.dtype, emulated: bool) -> Tensor:
    return x.to(dtype).float() if emulated else x


@_odd_polynomials.register_fake
def _(matrix: Tensor, coefficients: list[float], dtype: torch.dtype, eps: float, safety: float) -> Tensor:
    return torch.empty_like(matrix, memory_format=torch.contiguous_format)
