"""What SUMO and GaLore share: a basis Q per matrix, the projection onto it, its renewal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from optimizers.layouts.replicated import Rows
from optimizers.linalg.subspace import randomized_basis, svd_basis, test_matrix
from optimizers.presets import default_rank
from optimizers.stacks import Stack

OVERSAMPLING = 8
# Products with GᵀG in the range finder; fixed, so that every layout computes the same basis. With two a basis captures
# at least 0.98 of the best energy also on spectra as flat as i^-½, from a cold start too; with one it may miss 3 to 6 %
# of it, and saves a third of the time (docs/optimizers.md).
PASSES = 2


def keeps_left(shape: tuple[int, int], side: str) -> bool:
    """Whether Q multiplies from the left (Ĝ = QᵀG, r×n) rather than from the right (Ĝ = GQ, m×r).

    "short": the moment keeps the short side; square: from the left. "long": the long side; square: from the
    right.
    """
    m, n = shape
    return m >= n if side == "short" else m < n


def rank_of(shape: tuple[int, int], options: Mapping[str, Any]) -> int:
    """r: the option, or a quarter of the short side."""
    rank = options["rank"]
    return default_rank(*shape) if rank is None else rank


def subspace_state(shape: tuple[int, int], options: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shapes of "basis" (m×r or n×r) and "moment" (r×n or m×r)."""
    (m, n), r = shape, rank_of(shape, options)
    if keeps_left(shape, options["side"]):
        return {"basis": (m, r), "moment": (r, n)}
    return {"basis": (n, r), "moment": (m, r)}


def project(gradient: Tensor, basis: Tensor, left: bool) -> Tensor:
    """Ĝ = QᵀG (b, r, n), or GQ (b, m, r)."""
    return basis.mT @ gradient if left else gradient @ basis


def project_back(basis: Tensor, moved: Tensor, left: bool, out: Tensor, keep: float = 0.0) -> Tensor:
    """keep·out + Q·X (left) or keep·out + X·Qᵀ (right), (b, m, n), written over `out`."""
    first, second = (basis, moved) if left else (moved, basis.mT)
    if keep == 0.0:
        return torch.bmm(first, second, out=out)
    return out.baddbmm_(first, second, beta=keep)


def refresh(stacks: Sequence[Stack], rows: Rows) -> None:
    """Renew the bases that are due, and carry the moments over where the options say so (Block 1.1 of SUMO).

    Without transport the old moment is read in the new basis as it stands; that is what GaLore does.
    """
    due = [(stack, at) for stack in stacks for at in stack.runs()]
    makers = [partial(_new_basis, stack, at) for stack, at in due]
    bases = rows.bases(makers, [stack.state["basis"][at] for stack, at in due])
    for (stack, at), basis in zip(due, bases):
        if stack.options["transport"]:
            overlap = basis.mT @ stack.state["basis"][at]
            moment = stack.state["moment"][at]
            left = keeps_left(stack.shape, stack.options["side"])
            stack.commit("moment", overlap @ moment if left else moment @ overlap.mT, at)
        stack.commit("basis", basis, at)


def refresh_number(step: int, options: Mapping[str, Any], offset: int) -> int:
    """Which renewal of this matrix the one at `step` is, counted from 0."""
    interval = options["refresh_interval"]
    return (step + offset) // interval - offset // interval


def _number(stack: Stack, i: int) -> int:
    return refresh_number(stack.steps[i], stack.options, stack.members[i].offset)


def _new_basis(stack: Stack, at: slice) -> Tensor:
    """(b', m or n, r) leading singular vectors of the gradients `at`."""
    gradient, options = stack.gradient[at], stack.options
    side = "left" if keeps_left(stack.shape, options["side"]) else "right"
    rank = rank_of(stack.shape, options)
    if options["basis"] == "svd":
        return svd_basis(gradient, rank, side)
    sketch = stack.shape[1], min(rank + OVERSAMPLING, *stack.shape)
    tests = [
        test_matrix(options["seed"], stack.members[i].block.name, _number(stack, i), sketch)
        for i in range(at.start, at.stop)
    ]
    test = torch.stack(tests).to(gradient.device, non_blocking=True)
    return randomized_basis(gradient, rank, side, test, passes=PASSES, warm=stack.state["basis"][at])
