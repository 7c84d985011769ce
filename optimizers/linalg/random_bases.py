"""Bases of random numbers, and coin tosses, that are a function of a key: the same on every process and device."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from optimizers.linalg.counter_normals import counter_normals
from optimizers.linalg.requests import answer_alone, drive
from optimizers.linalg.robust import full_precision
from optimizers.linalg.subspace import orthonormal


def refresh_key(seed: int, name: str, number: int, purpose: str = "") -> int:
    """Return 64 bits that depend on the arguments alone.

    Args:
        seed: of the run.
        name: of the matrix.
        number: of the step or refresh.
        purpose: what the bits are for, where one matrix needs several.
    """
    digest = hashlib.sha256(f"{seed}/{name}/{number}{purpose and '/'}{purpose}".encode()).digest()
    return int.from_bytes(digest[:8], "little")


def coin(key: int, probability: float) -> bool:
    """Return True for this share of all keys."""
    return key < probability * 2.0**64


def random_basis(
    keys: Sequence[int], rows: int, rank: int, device: torch.device, is_orthonormal: bool
) -> Tensor:
    """Return (len(keys), rows, rank) fp32 bases, one for each key.

    Normal numbers of variance 1/rank, for which ‖QᵀG‖² is ‖G‖² in the mean (APOLLO, arXiv 2412.05270); or orthonormal,
    which gives a uniformly distributed subspace (GoLore, arXiv 2410.11289): Z(ZᵀZ)^(-1/2) up to a rotation, by two
    passes of CholeskyQR, so that all processes may compute it for themselves.

    Args:
        keys: 64 bits each.
        rows: of a basis.
        rank: columns.
        device: where they are made.
        is_orthonormal: which of the two.
    """
    normals = torch.stack([counter_normals(key, (rows, rank), device) for key in keys])
    if not is_orthonormal:
        return normals / math.sqrt(rank)
    with full_precision(device.type):
        once = drive(orthonormal(normals, False), answer_alone)
        return drive(orthonormal(once, False), answer_alone)
