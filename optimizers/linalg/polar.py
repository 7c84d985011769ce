"""The polar factor O of M = O H: O = U Vᵀ of the thin SVD, with the directions below a cut left out."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from optimizers.linalg.inverse_root import root_by_dwh, root_by_eigh
from optimizers.linalg.newton_schulz import cubic, newton_schulz, polar_express
from optimizers.linalg.robust import (
    GRAM_RTOL,
    choose_method,
    cleaned,
    default_rtol,
    finite_matrices,
    flattened,
    full_precision,
    rescue_svd,
    robust_svd,
    thin_svd_of_tall,
    work_dtype,
)

EXACT = ("svd", "qr_svd", "gram", "dwh")
APPROXIMATE = ("newton_schulz", "cubic", "polar_express")
METHODS = (*EXACT, *APPROXIMATE, "auto")


class Polar(NamedTuple):
    """What `polar` returns; leading dimensions as the input."""

    factor: Tensor  # (…, m, n), dtype of the matrix
    singular_values: (
        Tensor | None
    )  # (…, min(m, n)) descending, fp32 (fp64 for fp64 input); None: method has none
    effective_rank: Tensor | None  # (…) int64, singular values above the cut; None for approximate methods
    fallbacks: Tensor  # 0-dim int64, on the device: matrices that the method could not do by itself


def polar(matrix: Tensor, method: str = "auto", rtol: float | None = None) -> Polar:
    """Return the polar factor of each matrix of a batch.

    Exact methods: "svd" (fp32, or fp64 for fp64 input), "qr_svd" (fp64), "gram" (fp64 Gram and eigh; a matrix
    with singular values between the cut and 1e-6 σ1 goes to "qr_svd"), "dwh" (fp64 Gram and Halley steps, with the
    same cut and, unless `rtol` is below 1e-6, without a host read). They drop the directions with σ ≤ rtol·σ1, so
    ‖O‖_F² is the effective rank. Approximate methods, in fp32 (fp64 for fp64 input): "newton_schulz" (5 steps),
    "cubic" (5), "polar_express" (8); they have no spectrum and no cut. "auto": `choose_method`.

    Never raises on data. A matrix that is not finite gets a zero factor, NaN singular values and rank 0, and
    counts as a fallback: in an update it means "do not move", and no other matrix of the stack notices. A
    zero matrix gets a zero factor and rank 0. TF32, reduced-precision products and autocast are off inside,
    whatever is switched on outside. Detached from autograd.

    Args:
        matrix: (…, m, n), floating point.
        rtol: cut relative to σ1; None: max(m, n)·eps (`default_rtol`).

    Raises:
        ValueError: unknown method, fewer than two dimensions, not floating point, rtol outside [0, 1).
    """
    if method not in METHODS:
        raise ValueError(f"polar: unknown method {method!r}; known: {', '.join(METHODS)}")
    if matrix.ndim < 2 or not matrix.is_floating_point():
        raise ValueError(f"polar: expects floating (…, m, n), got {tuple(matrix.shape)} {matrix.dtype}")
    if rtol is not None and not 0.0 <= rtol < 1.0:
        raise ValueError(f"polar: rtol must lie in [0, 1), got {rtol}")
    name = choose_method(matrix.shape, matrix.dtype, matrix.device) if method == "auto" else method
    if name in APPROXIMATE:
        return _approximate(matrix.detach(), name)
    cut = default_rtol(matrix.shape, matrix.dtype) if rtol is None else float(rtol)
    factor, values, rank, fallbacks = _exact_polar(matrix.detach(), name, cut)
    return Polar(factor, None if name == "dwh" else values, rank, fallbacks)


def _approximate(matrix: Tensor, method: str) -> Polar:
    dtype = work_dtype(matrix.dtype)
    flat = flattened(matrix)
    finite = finite_matrices(flat)
    if method == "newton_schulz":
        factor = newton_schulz(matrix, dtype=dtype)
    elif method == "cubic":
        factor = cubic(matrix, dtype=dtype)
    else:
        factor = polar_express(matrix, steps=8, dtype=dtype)
    factor = cleaned(factor.view_as(flat), finite).view(matrix.shape)
    return Polar(factor, None, None, (~finite).sum())


@torch.library.custom_op("optbench::exact_polar", mutates_args=())
def _exact_polar(matrix: Tensor, method: str, rtol: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    # An operator of its own: a compiled rule keeps one graph across the data-dependent fallbacks in here.
    with full_precision(matrix.device.type):
        m, n = matrix.shape[-2:]
        flat = flattened(matrix)
        tall = (flat.mT if m < n else flat).to(work_dtype(matrix.dtype))
        finite = finite_matrices(tall)
        clean, scale = _scaled(cleaned(tall, finite))
        if clean.numel():
            factor, values, rank, fell_back = _SOLVERS[method](clean, rtol)
        else:
            factor, values = clean.clone(), clean.new_zeros(clean.shape[0], clean.shape[-1])
            rank, fell_back = values.new_zeros(clean.shape[0], dtype=torch.int64), ~finite
        values = values if scale is None else values * scale[:, :, 0]
        values = torch.where(finite[:, None], values, torch.nan)
        factor = (factor.mT if m < n else factor).to(matrix.dtype).contiguous()
        batch = matrix.shape[:-2]
        fallbacks = (fell_back | ~finite).sum()
        return (
            factor.view(matrix.shape),
            values.to(clean.dtype).reshape(*batch, values.shape[-1]).contiguous(),
            rank.reshape(batch),
            fallbacks,
        )


@_exact_polar.register_fake
def _(matrix: Tensor, method: str, rtol: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, short = matrix.shape[:-2], min(matrix.shape[-2:])
    return (
        torch.empty_like(matrix, memory_format=torch.contiguous_format),
        matrix.new_empty(*batch, short, dtype=work_dtype(matrix.dtype)),
        matrix.new_empty(batch, dtype=torch.int64),
        matrix.new_empty((), dtype=torch.int64),
    )


def _scaled(tall: Tensor) -> tuple[Tensor, Tensor | None]:
    """Scale fp64 matrices to a largest entry of 1, because their squares, unlike those of fp32, may overflow."""
    if tall.dtype != torch.float64 or tall.numel() == 0:
        return tall, None
    scale = tall.abs().amax((-2, -1), keepdim=True)
    scale = torch.where(scale > 0, scale, 1.0)
    return tall / scale, scale


# A solver: finite tall stack (b, L, r) → factor, singular values (b, r), rank (b,) int64, fell_back (b,)
# bool.
_Solution = tuple[Tensor, Tensor, Tensor, Tensor]


def _assemble(left: Tensor, values: Tensor, right: Tensor, rtol: float) -> tuple[Tensor, Tensor]:
    keep = values > rtol * values[:, :1]
    return (left * keep[:, None, :]) @ right, keep.sum(-1)


def _by_svd(tall: Tensor, rtol: float) -> _Solution:
    parts = robust_svd(tall, lambda t: tuple(torch.linalg.svd(t, full_matrices=False)))
    left, values, right, rescued = parts
    factor, rank = _assemble(left, values, right, rtol)
    return factor, values, rank, rescued


def _by_qr_svd(tall: Tensor, rtol: float) -> _Solution:
    left, values, right, rescued = robust_svd(tall.double(), thin_svd_of_tall)
    factor, rank = _assemble(left, values, right, rtol)
    return factor.to(tall.dtype), values, rank, rescued


# Both Gram methods also multiply by the root in fp64: in fp32 that product alone would cost eps32·κ, as much
# as the
# SVD it is to beat.
def _by_gram(tall: Tensor, rtol: float) -> _Solution:
    wide = tall.double()
    root, values, rank, rescued = root_by_eigh(wide.mT @ wide, rtol)
    factor = (wide @ root).to(tall.dtype)
    if rtol < GRAM_RTOL:
        hidden = ((values[:, :1] > 0) & (values < GRAM_RTOL * values[:, :1])).any(-1)
        factor, values, rank = _by_rescue(tall, hidden, rtol, (factor, values, rank))
        rescued = rescued | hidden
    return factor, values, rank, rescued


def _by_rescue(
    tall: Tensor, which: Tensor, rtol: float, solution: tuple[Tensor, Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return `solution` with the matrices `which` (b,) recomputed by QR-SVD.

    A Gram matrix is too inaccurate for them.
    """
    factor, values, rank = solution
    for index in which.nonzero().flatten().tolist():
        left, exact, right = rescue_svd(tall[index])
        again, again_rank = _assemble(left[None], exact[None], right[None], rtol)
        factor[index], values[index], rank[index] = again[0].to(tall.dtype), exact, again_rank[0]
    return factor, values, rank


def _by_dwh(tall: Tensor, rtol: float) -> _Solution:
    wide = tall.double()
    root, values, rank, fell_back = root_by_dwh(wide.mT @ wide, rtol)
    factor = (wide @ root).to(tall.dtype)
    if rtol < GRAM_RTOL:
        hidden = (rank > 0) & (rank < tall.shape[-1])
        factor, values, rank = _by_rescue(tall, hidden, rtol, (factor, values, rank))
        fell_back = fell_back | hidden
    return factor, values, rank, fell_back


_SOLVERS: dict[str, Callable[[Tensor, float], _Solution]] = {
    "svd": _by_svd,
    "qr_svd": _by_qr_svd,
    "gram": _by_gram,
    "dwh": _by_dwh,
}
