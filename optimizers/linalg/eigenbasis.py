"""Eigenbases of symmetric positive semidefinite matrices: from scratch, and one power iteration further (SOAP)."""

from __future__ import annotations

import torch
from torch import Tensor

from optimizers.linalg.requests import Eigh, answer_alone
from optimizers.linalg.robust import full_precision


def eigenbasis(gram: Tensor, rtol: float) -> Tensor:
    """Return orthonormal eigenvectors (b, k, k) of Grams (b, k, k), by descending eigenvalue.

    Eigenvectors of eigenvalues up to rtol·λ1 are rounding noise, and another machine would find others. They are
    replaced by unit vectors, made orthonormal to the rest: a smooth function of what the Gram does determine.

    Args:
        gram: fp64.
        rtol: cut, relative to the largest eigenvalue.
    """
    with full_precision(gram.device.type):
        values, vectors = answer_alone(Eigh(gram))
        values, vectors = values.flip(-1), vectors.flip(-1)
        known = (values > rtol * values[..., :1])[..., None, :]
        kept = vectors * known
        rest = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device) - kept @ kept.mT
        return torch.linalg.qr(torch.where(known, kept, rest)).Q


def iterated_basis(gram: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """Improve eigenvectors by one power iteration and QR (SOAP, arXiv 2409.11321, Algorithm 4).

    Args:
        gram: L, (b, k, k).
        basis: Q, (b, k, k) orthonormal columns. A zero one, which was never made, counts as the identity.

    Returns:
        Q of the QR decomposition of L Q with its columns by descending estimate diag(QᵀLQ), and (b, k) which column of
        the old basis each of the new one comes from.
    """
    with full_precision(gram.device.type):
        is_empty = (basis == 0).all(-1).all(-1)[:, None, None]
        identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
        basis = torch.where(is_empty, identity, basis.to(gram.dtype))
        product = gram @ basis
        estimates = (basis * product).sum(-2)
        order = torch.argsort(estimates, dim=-1, descending=True, stable=True)
        ordered = product.gather(-1, order[:, None, :].expand_as(product))
        return torch.linalg.qr(ordered).Q, order
