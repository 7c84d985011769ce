"""Figures read off a spectrum or a factor: condition number, ranks, and the two errors of a polar factor."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from optimizers.linalg.polar import polar
from optimizers.linalg.robust import default_rtol


class MomentFigures(NamedTuple):
    """Figures of a stack of spectra; every field has the stack's leading dimensions."""

    condition_number: Tensor  # σ1 / last σ above the cut; NaN for a zero or non-finite matrix
    effective_rank: Tensor  # int64: how many σ lie above the cut
    stable_rank: Tensor  # ‖M‖_F²/σ1² (all σ); 0 for a zero matrix


def figures(
    singular_values: Tensor,
    shape: tuple[int, ...] | torch.Size,
    dtype: torch.dtype = torch.float32,
    rtol: float | None = None,
) -> MomentFigures:
    """Return condition number, effective rank and stable rank of spectra.

    Args:
        singular_values: (…, k) descending.
        shape: (m, n) or (…, m, n) of the matrices; sets the default cut.
        dtype: of the matrices; sets the default cut.
        rtol: cut relative to σ1; None: max(m, n)·eps(dtype).
    """
    values = singular_values.detach().double()
    cut = default_rtol(shape, dtype) if rtol is None else rtol
    top = values[..., :1]
    keep = values > cut * top
    last = torch.where(keep, values, torch.inf).amin(-1)
    rank = keep.sum(-1)
    condition = torch.where(rank > 0, top[..., 0] / last, torch.nan)
    ratio = values / torch.where(top > 0, top, 1.0)
    return MomentFigures(condition, rank, ratio.square().sum(-1))


def orthogonality_error(factor: Tensor) -> Tensor:
    """Return ‖OOᵀ - I‖_F/√k on the short side, k = min(m, n); (…, m, n) → (…) fp64.

    Says nothing about whether O is the polar factor of a given matrix (`polar_error` does). A factor with
    dropped directions has √(dropped/k).
    """
    # In fp64, which neither autocast nor the reduced-precision switches touch.
    x = factor.detach().double()
    x = x.mT if x.shape[-2] > x.shape[-1] else x
    k = x.shape[-2]
    identity = torch.eye(k, dtype=x.dtype, device=x.device)
    return torch.linalg.matrix_norm(x @ x.mT - identity) / max(k, 1) ** 0.5


def polar_error(factor: Tensor, matrix: Tensor, rtol: float | None = None) -> Tensor:
    """Return ‖O - polar(M)‖_F/√k against the exact factor of `matrix` (QR-SVD in fp64); (…, m, n) → (…) fp64.

    Args:
        factor: (…, m, n), the factor to judge.
        matrix: (…, m, n), what it is the factor of.
        rtol: cut of the exact factor relative to σ1; None: the default for the dtype of `matrix`.
    """
    cut = default_rtol(matrix.shape, matrix.dtype) if rtol is None else rtol
    exact = polar(matrix.detach().double(), "qr_svd", cut).factor
    k = max(min(matrix.shape[-2:]), 1)
    return torch.linalg.matrix_norm(factor.detach().double() - exact) / k**0.5
