"""Eigenbases of a batch's Grams (SOAP): made, used, and renewed by one process for all of its replicas."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from optimizers.interfaces import BroadcastBasis, MatrixBatch, Steps, contiguous
from optimizers.linalg.eigenbasis import eigenbasis, iterated_basis
from optimizers.linalg.robust import default_rtol

_IS_LEFT = {"left": True, "right": False}


def _sides(b: MatrixBatch) -> list[str]:
    return [side for side in _IS_LEFT if f"{side}_basis" in b.state]


def _gram_of(gradient: Tensor, side: str) -> Tensor:
    return gradient @ gradient.mT if _IS_LEFT[side] else gradient.mT @ gradient


def start_eigenbases(b: MatrixBatch, fresh: Sequence[int]) -> Steps[None]:
    """Set the bases of the matrices `fresh` to the eigenvectors of GGᵀ and GᵀG, computed in fp64."""
    spans = [(side, at) for side in _sides(b) for at in contiguous(fresh)]
    rtol = default_rtol(b.shape, torch.float32) ** 2

    def make(side: str, at: slice) -> Tensor:
        return eigenbasis(_gram_of(b.gradient[at].double(), side), rtol).to(b.dtype)

    # Lists, also empty ones: batches that renew nothing stay in step with those that do.
    bases = yield [
        BroadcastBasis(partial(make, side, at), b.state[f"{side}_basis"][at], _work(b, side, at))
        for side, at in spans
    ]
    for (side, at), basis in zip(spans, bases):
        b.commit(f"{side}_basis", basis, at)


def rotated(b: MatrixBatch, matrices: Tensor, back: bool = False) -> Tensor:
    """Return Q_LᵀXQ_R of matrices (b, m, n); with `back` Q_LXQ_Rᵀ. A side without a basis stays as it is."""
    for side in _sides(b):
        basis = b.state[f"{side}_basis"]
        if _IS_LEFT[side]:
            matrices = (basis if back else basis.mT) @ matrices
        else:
            matrices = matrices @ (basis.mT if back else basis)
    # A rule may overwrite it.
    return matrices if _sides(b) else matrices.clone()


def accumulate_grams(b: MatrixBatch, gradient: Tensor) -> None:
    """Advance L and R by the gradient (b, m, n): L ← β₂L + (1 - β₂)GGᵀ."""
    beta = b.options["betas"][1]
    for side in _sides(b):
        kind = f"{side}_gram"
        if b.options["gram_dtype"] == "float32":
            b.blend(kind, _gram_of(gradient, side), beta, 1.0 - beta)
            continue
        wide = torch.lerp(_wide(b.state[kind]), _gram_of(gradient.double(), side), 1.0 - beta)
        high = wide.to(b.dtype)
        b.commit(kind, torch.stack([high, (wide - high).to(b.dtype)], 1))


def _wide(gram: Tensor) -> Tensor:
    """Return the fp64 Grams of (b, 2, k, k), the sum of two numbers each."""
    return gram[:, 0].double() + gram[:, 1].double()


def iterate_eigenbases(b: MatrixBatch, due: Sequence[int]) -> Steps[None]:
    """Improve the bases of the matrices `due`, and carry both moments over.

    M' ← Q_newᵀQ_old M'; V is an estimate for each column of the old bases, and moves with it.
    """
    spans = [(side, at) for side in _sides(b) for at in contiguous(due)]

    def make(side: str, at: slice) -> Tensor:
        gram = b.state[f"{side}_gram"][at]
        wide = gram if b.options["gram_dtype"] == "float32" else _wide(gram)
        basis, order = iterated_basis(wide, b.state[f"{side}_basis"][at])
        # The order travels with the basis, exact in fp32 up to 2²⁴ columns: all replicas turn V alike.
        return torch.cat([basis, order[..., None]], -1).to(b.dtype)

    def like(side: str, at: slice) -> Tensor:
        old = b.state[f"{side}_basis"][at]
        return old.new_empty((*old.shape[:-1], old.shape[-1] + 1))

    replies = yield [
        BroadcastBasis(partial(make, side, at), like(side, at), _work(b, side, at)) for side, at in spans
    ]
    for (side, at), reply in zip(spans, replies):
        new, order = reply[..., :-1], reply[..., -1].long()
        turn = new.mT @ b.state[f"{side}_basis"][at]
        moment, second = b.state["moment"][at], b.state["second_moment"][at]
        if _IS_LEFT[side]:
            b.commit("moment", turn @ moment, at)
            b.commit("second_moment", second.gather(-2, order[:, :, None].expand_as(second)), at)
        else:
            b.commit("moment", moment @ turn.mT, at)
            b.commit("second_moment", second.gather(-1, order[:, None, :].expand_as(second)), at)
        b.commit(f"{side}_basis", new, at)


def _work(b: MatrixBatch, side: str, at: slice) -> float:
    return (at.stop - at.start) * b.shape[0 if _IS_LEFT[side] else 1] ** 3
