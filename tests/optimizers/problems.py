"""Runs an optimizer beside its oracle, each on the gradients at its own weights."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import torch

import optimizers
from tests.oracles.streams import Matrix, Stream


class Oracle(Protocol):
    """A numpy twin of a rule for one matrix."""

    weight: Matrix

    def step(self, gradient: Matrix) -> Matrix:
        """One step; returns the new weight."""
        ...


def run_both(
    preset: str,
    oracle: Oracle,
    ours: Stream,
    theirs: Stream,
    steps: int,
    *,
    dtype: torch.dtype = torch.float64,
    gradient_scale: float = 1.0,
    **options: Any,
) -> float:
    """‖W - W_oracle‖_F / ‖W_oracle - W_0‖_F after `steps`.

    Args:
        preset: of `optimizers`, on the oracle's start.
        ours, theirs: equal streams, one for each side.
        gradient_scale: factor on our gradients only.
        options: of the preset.
    """
    start = oracle.weight.copy()
    weight = torch.nn.Parameter(torch.from_numpy(start.copy()).to(dtype))
    optimizer = optimizers.build(preset, [("w", weight)], **options)
    for _ in range(steps):
        gradient = gradient_scale * ours(weight.detach().double().numpy())
        weight.grad = torch.from_numpy(gradient).to(dtype)
        optimizer.step()
        oracle.step(theirs(oracle.weight))
    moved = np.linalg.norm(oracle.weight - start)
    return float(np.linalg.norm(weight.detach().double().numpy() - oracle.weight) / moved)
