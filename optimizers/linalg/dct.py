"""Columns of the DCT-II matrix as a basis: which of them hold most of a gradient, and the columns themselves.

D[j, k] = s_k cos(π(2j + 1)k / 2L) with s_0 = √(1/L), else √(2/L), is orthonormal (N. Ahmed, T. Natarajan and K. Rao,
IEEE Trans. Computers C-23, 1974). A subspace is then r column numbers, and D is one matrix for all that have this side.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from optimizers.linalg.requests import AllReduce
from optimizers.linalg.subspace import Steps


@lru_cache(maxsize=16)
def dct_matrix(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return D (size, size), computed in fp64."""
    index = torch.arange(size, device=device, dtype=torch.int64)
    # The angle modulo 2π, exactly: (2j + 1)k is up to 2·size² and would lose digits as a product of floats.
    turns = ((2 * index[:, None] + 1) * index) % (4 * size)
    matrix = torch.cos(turns.double() * (math.pi / (2 * size))) * math.sqrt(2.0 / size)
    matrix[:, 0] = math.sqrt(1.0 / size)
    return matrix.to(dtype)


def dct_columns(columns: Tensor, size: int, start: int, stop: int) -> Tensor:
    """Return rows [start, stop) of the columns of D, (b, stop - start, r).

    Args:
        columns: (b, r) column numbers as floats, of the dtype of the result; below 0: a column of zeros.
        size: of D.
        start, stop: rows.
    """
    if columns.device.type == "meta":
        return columns.new_empty(columns.shape[0], stop - start, columns.shape[1])
    matrix = dct_matrix(size, columns.dtype, columns.device)[start:stop]
    index = columns.clamp_min(0.0).long()
    picked = matrix.index_select(1, index.reshape(-1)).view(stop - start, *columns.shape).transpose(0, 1)
    return torch.where(columns[:, None, :] >= 0, picked, 0.0)


def dct_coefficients(gradient: Tensor, left: bool) -> Tensor:
    """Return DᵀG with `left`, else GD, by one complex FFT along the axis (J. Makhoul, IEEE Trans. ASSP-28, 1980).

    Args:
        gradient: (b, m, n).
    """
    rows = gradient.mT if left else gradient
    size = rows.shape[-1]
    shuffled = torch.cat([rows[..., ::2], rows[..., 1::2].flip(-1)], -1)
    index = torch.arange(size, device=gradient.device, dtype=torch.float64)
    twist = torch.polar(torch.full_like(index, math.sqrt(2.0 / size)), index * (-math.pi / (2 * size)))
    twist[0] = math.sqrt(1.0 / size)
    spectrum = torch.fft.fft(shuffled)
    values = (spectrum * twist.to(spectrum.dtype)).real
    return values.mT if left else values


def leading_dct_columns(
    gradient: Tensor,
    rank: int,
    left: bool,
    rtol: float,
    split: int | None,
    start: int,
    shape: tuple[int, int],
) -> Steps:
    """Choose the columns of D that hold most of the gradient: the largest ‖D_kᵀG‖, so that ‖QᵀG‖_F is largest.

    arXiv 2505.17967, §3, with the 2-norm (its Theorem on contraction; the public code's default is the 1-norm). Nothing
    is read by the host; of equal energies the lower column wins.

    Args:
        gradient: (b, m, n), or this process' rows (split=0) or columns (split=1).
        rank: columns to choose.
        left: D runs along the rows of the gradient.
        rtol: coefficients below this part of the largest one are rounding; their columns are not taken.
        split, start: axis that is split over ranks, and where this process' interval begins.
        shape: (m, n) of a whole gradient.

    Returns:
        (b, rank) column numbers in ascending order, as floats of the gradient's dtype; -1 where no more hold anything.
    """
    axis = 0 if left else 1
    if gradient.device.type == "meta":
        coefficients = gradient.new_empty(len(gradient), *shape) if split == axis else gradient
    elif split == axis:
        part = dct_matrix(shape[axis], gradient.dtype, gradient.device)[
            start : start + gradient.shape[1 + axis]
        ]
        coefficients = part.mT @ gradient if left else gradient @ part
    else:
        coefficients = dct_coefficients(gradient, left)
    coefficients = yield AllReduce(coefficients, split == axis)
    energy = torch.linalg.vector_norm(coefficients, dim=2 - axis, dtype=torch.float64).square()
    energy = yield AllReduce(energy, split == 1 - axis)
    energy = torch.where(energy.isfinite(), energy, 0.0)
    values, order = torch.sort(energy, dim=-1, descending=True, stable=True)
    is_held = values[:, :rank] > rtol**2 * values[:, :1]
    return torch.where(is_held, order[:, :rank], -1).sort(dim=-1).values.to(gradient.dtype)
