"""Keep the Frobenius norm of every hidden matrix at what it was before the first step (`weight_norm`).

Wen et al. 2026, arXiv 2606.16899 (Hyperball): W ← R·Norm(W - η R·Norm(U)) with Norm(X) = X/‖X‖_F and R = ‖W₀‖_F.
`hyperball` is this; `fixed` leaves the update as it is. A matrix that starts as zeros has no norm to keep and is free.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from optimizers.hooks import UnitParts, masks_of
from optimizers.interfaces import compute_dtype
from optimizers.options import OptionError
from optimizers.skipping import StepMask

KIND = "weight_norm"
"""Kind of state: R, 0-dim fp64, on every process."""


class WeightNorms:
    """The `StepHook` of `weight_norm`."""

    def allocate(self, parts: UnitParts) -> None:
        """Add R = 0 for each matrix, which the first step replaces.

        Raises:
            OptionError: weights in half precision, whose rounding is coarser than what the scaling changes.
        """
        if not _is_on(parts):
            return
        for matrix in parts.matrices:
            weight = parts.layout.weight(matrix.parameter)
            if weight.dtype != compute_dtype(weight):
                raise OptionError(
                    "weight_norm",
                    parts.options["weight_norm"],
                    f"needs fp32 weights, and {matrix.block.name} is {str(weight.dtype).removeprefix('torch.')}: "
                    "rounding would undo the scaling",
                    ("free", "fp32 weights (precision=bf16 keeps them)"),
                )
            parts.state[matrix.parameter].setdefault(
                matrix.key(KIND), torch.zeros((), dtype=torch.float64, device=weight.device)
            )

    def before(self, parts: UnitParts, mask: StepMask) -> None:
        """Take the norms before the first step of any of the matrices."""
        if not _is_on(parts):
            return
        first = [i for i, m in enumerate(parts.matrices) if parts.state[m.parameter]["step"] == 0]
        if first:
            norms = _norms(parts)
            for i in first:
                matrix = parts.matrices[i]
                parts.state[matrix.parameter][matrix.key(KIND)].copy_(norms[i])

    def after(self, parts: UnitParts, stepped: Sequence[Tensor], mask: StepMask) -> None:
        """Scale each matrix back to its norm (one all-reduce of as many numbers as there are matrices)."""
        if not _is_on(parts):
            return
        matrices = parts.matrices
        norms = _norms(parts)
        radii = torch.stack([parts.state[m.parameter][m.key(KIND)] for m in matrices])
        factors = torch.where((radii > 0) & (norms > 0), radii / norms, 1.0)
        masked = masks_of(matrices, stepped, mask, factors.device)
        if masked is not None:
            # A product with 1 keeps every bit.
            factors = torch.where(masked, 1.0, factors)
        for matrix, factor in zip(matrices, factors.unbind(0)):
            weight = matrix.view.held(matrix.parameter, matrix.block)
            weight.mul_(factor.to(weight.dtype))


def _is_on(parts: UnitParts) -> bool:
    return parts.options.get("weight_norm", "free") != "free" and len(parts.matrices) > 0


def _norms(parts: UnitParts) -> Tensor:
    """Return the Frobenius norms of a unit's matrices (k,) fp64 (a collective where they are split)."""
    held = [m.view.held(m.parameter, m.block) for m in parts.matrices]
    squares = torch.stack([torch.linalg.vector_norm(part, dtype=torch.float64).square() for part in held])
    return parts.layout.sum_parts(parts.unit, squares).sqrt()
