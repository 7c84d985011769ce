"""What SUMO and GaLore share: a basis Q per matrix, the projection onto it, its renewal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from optimizers.layouts.rows import Rows
from optimizers.linalg import sketching
from optimizers.linalg.subspace import basis_cut, randomized_basis, svd_basis, test_matrix
from optimizers.presets import default_rank
from optimizers.stacks import Axes, LowRank, Stack

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


def subspace_axes(shape: tuple[int, int], options: Mapping[str, Any]) -> dict[str, Axes]:
    """Which axis of the matrix (0 rows, 1 columns) each dimension of `subspace_state` runs along."""
    if keeps_left(shape, options["side"]):
        return {"basis": (0, None), "moment": (None, 1)}
    return {"basis": (1, None), "moment": (0, None)}


def projection_traffic(shape: tuple[int, int], split: int, options: Mapping[str, Any], ranks: int) -> float:
    """Bytes of Ĝ that a rank sends for one matrix: an all-reduce where Q contracts the axis that is split."""
    left = keeps_left(shape, options["side"])
    if split != contracted(left):
        return 0.0
    return 8.0 * rank_of(shape, options) * shape[1 - split] * (ranks - 1) / ranks


def projected(stacks: Sequence[Stack], lefts: Sequence[bool], rows: Rows) -> list[Tensor]:
    """Ĝ of each stack, complete: a sum over ranks where the axis that Q contracts is split."""
    shares = [s.projected(s.state["basis"], left) for s, left in zip(stacks, lefts)]
    return rows.total(shares, [s.split == contracted(left) for s, left in zip(stacks, lefts)])


def contracted(left: bool) -> int:
    """The axis that Q contracts, which is also the one its rows run along."""
    return 0 if left else 1


def lifted(basis: Tensor, moved: Tensor, left: bool, keep: float = 0.0) -> LowRank:
    """keep·G + Q·X (left) or keep·G + X·Qᵀ (right)."""
    return LowRank(basis, moved, keep) if left else LowRank(moved, basis.mT, keep)


def refresh(stacks: Sequence[Stack], rows: Rows) -> None:
    """Renew the bases that are due, and carry the moments over where the options say so (Block 1.1 of SUMO).

    Without transport the old moment is read in the new basis as it stands; that is what GaLore does.
    """
    due = [(stack, at) for stack in stacks for at in stack.runs()]
    makers = [partial(_new_basis, stack, at) for stack, at in due]
    bases = rows.bases(makers, [stack.state["basis"][at] for stack, at in due])
    carried = [(stack, at, basis) for (stack, at), basis in zip(due, bases) if stack.options["transport"]]
    lefts = [keeps_left(stack.shape, stack.options["side"]) for stack, _, _ in carried]
    overlaps = rows.total(
        [basis.mT @ stack.state["basis"][at] for stack, at, basis in carried],
        [stack.split == contracted(left) for (stack, _, _), left in zip(carried, lefts)],
    )
    for (stack, at, _), left, overlap in zip(carried, lefts, overlaps):
        moment = stack.state["moment"][at]
        stack.commit("moment", overlap @ moment if left else moment @ overlap.mT, at)
    for (stack, at), basis in zip(due, bases):
        stack.commit("basis", basis, at)


def refresh_number(step: int, options: Mapping[str, Any], offset: int) -> int:
    """Which renewal of this matrix the one at `step` is, counted from 0."""
    interval = options["refresh_interval"]
    return (step + offset) // interval - offset // interval


def _number(stack: Stack, i: int) -> int:
    return refresh_number(stack.steps[i], stack.options, stack.members[i].offset)


def _new_basis(stack: Stack, at: slice) -> Tensor | sketching.Steps:
    """(b', m or n, r) leading singular vectors of the gradients `at`; of split ones, the steps to them."""
    gradient, options = stack.gradient[at], stack.options
    left = keeps_left(stack.shape, options["side"])
    side = "left" if left else "right"
    rank = rank_of(stack.shape, options)
    if stack.split is None:
        if options["basis"] == "svd":
            return svd_basis(gradient, rank, side)
        test = _tests(stack, at, rank)
        return randomized_basis(gradient, rank, side, test, passes=PASSES, warm=stack.state["basis"][at])
    rtol = basis_cut(stack.shape, gradient.dtype)
    if options["basis"] == "svd":
        steps = sketching.exact(gradient, rank, side, rtol, stack.split)
    else:
        test, warm = _tests(stack, at, rank).to(gradient), stack.state["basis"][at]
        if stack.split == 1:
            test = test[:, stack.start : stack.start + gradient.shape[-1]]
        steps = sketching.range_finder(gradient, rank, side, test, PASSES, warm, rtol, stack.split)
    return sketching.canonical(steps, stack.split == contracted(left), stack.start)


def _tests(stack: Stack, at: slice, rank: int) -> Tensor:
    """(b', n, rank + oversampling) test matrices of the matrices `at`, on the stack's device."""
    shape = stack.shape[1], min(rank + OVERSAMPLING, *stack.shape)
    device = stack.state["basis"].device
    if device.type == "meta":
        # A plan needs the shape only; drawing the numbers of a 7B model takes a minute.
        return torch.empty((at.stop - at.start, *shape), device=device)
    tests = [
        test_matrix(stack.options["seed"], stack.members[i].block.name, _number(stack, i), shape)
        for i in range(at.start, at.stop)
    ]
    return torch.stack(tests).to(device, non_blocking=True)
