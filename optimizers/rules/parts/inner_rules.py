"""What becomes of a projected gradient: orthogonalized momentum, Adam, or the sign of a momentum."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from optimizers.interfaces import GatherPolar, MatrixBatch, SolveRoot, Steps
from optimizers.linalg.polar import Polar
from optimizers.rules.parts.building_blocks import momentum, orthogonalize, root_solver, scale
from optimizers.rules.parts.norms import limit_growth, limits_whole_update
from optimizers.rules.parts.subspace_shapes import rank_of
from optimizers.rules.parts.subspaces import is_left, moment_is_split


class InnerStep(NamedTuple):
    """The step inside the subspace, N = size·direction.

    Attributes:
        direction: (b, r, n) or (b, m, r); may be overwritten.
        size: factor, `alpha` included; a number, or a tensor that broadcasts.
        moment, factor, singular_values, fallbacks: see `Update`.
    """

    direction: Tensor
    size: float | Tensor
    moment: Tensor | None = None
    factor: Tensor | None = None
    singular_values: Tensor | None = None
    fallbacks: Tensor | None = None


def inner_step(b: MatrixBatch, projected: Tensor) -> Steps[InnerStep]:
    """Run the rule that the option `inner` names on Ĝ."""
    # A limiter on the whole update compares it without alpha.
    alpha = 1.0 if limits_whole_update(b.options) else b.options["alpha"]
    return (yield from _RULES[b.options["inner"]](b, projected, alpha))


def _orthogonalized(b: MatrixBatch, projected: Tensor, alpha: float) -> Steps[InnerStep]:
    """M ← μM + Ĝ, N = s·(MMᵀ)^(-1/2) M; a limiter on the factor lets ‖O‖ grow at most by γ a step."""
    m = momentum(b, projected)
    o = yield from orthogonalize_subspace(b, m)
    factor = yield from limit_growth(b, "factor", o.factor)
    s = scale(b.options["update_scale"], b.shape, b.fans, rank_of(b.shape, b.options))
    return InnerStep(factor, s * alpha, m, o.factor, o.singular_values, o.fallbacks)


def _adam(b: MatrixBatch, projected: Tensor, alpha: float) -> Steps[InnerStep]:
    """M ← β₁M + (1 - β₁)Ĝ, V ← β₂V + (1 - β₂)Ĝ², N = M̂/(√V̂ + ε); with `eps_form` raw, ε is added to √V."""
    yield from ()
    (beta1, beta2), eps = b.options["betas"], b.options["eps"]
    first = b.blend("moment", projected, beta1, 1.0 - beta1)
    second = b.blend("second_moment", projected.square(), beta2, 1.0 - beta2)
    bias1, bias2 = 1.0 - beta1**b.count, (1.0 - beta2**b.count).sqrt()
    # (√b₂/b₁)·M/(√V + ε') is M̂/(√V̂ + ε) for ε' = ε√b₂, and the raw form for ε' = ε.
    size = (alpha * bias2 / bias1).to(first.dtype)
    floor = eps if b.options["eps_form"] == "raw" else (eps * bias2).to(first.dtype)
    return InnerStep(first.div(second.sqrt().add_(floor)), size)


def _signed(b: MatrixBatch, projected: Tensor, alpha: float) -> Steps[InnerStep]:
    """M ← μM + Ĝ, N = sign(M): every coordinate moves by the same amount."""
    yield from ()
    m = momentum(b, projected)
    return InnerStep(m.sign(), alpha, m)


_RULES: dict[str, Callable[[MatrixBatch, Tensor, float], Steps[InnerStep]]] = {
    "orthogonalize": _orthogonalized,
    "adam": _adam,
    "sign": _signed,
}


def orthogonalize_subspace(b: MatrixBatch, moment: Tensor) -> Steps[Polar]:
    """Return the factor of subspace moments, r×n (left) or m×r; where the method allows it, through the r×r Gram.

    The Gram is all that has to cross ranks, and for fp32 moments it loses nothing: the cut max(m, n)·eps32 lies above
    the 1e-6 below which an fp64 Gram cannot see. A split moment takes the Gram whatever the method: the exact ones its
    fp64 root, the polynomial ones the same polynomial of the Gram; where that would send more, it goes to an owner.
    """
    left, is_split = is_left(b), moment_is_split(b)
    r = moment.shape[-2 if left else -1]
    shape = (r, b.shape[1]) if left else (b.shape[0], r)
    if is_split and b.shard_bounds is not None and prefers_gather(max(shape), r, len(b.shard_bounds)):
        solve = partial(orthogonalize, options=b.options)
        return (yield GatherPolar(moment, shape, -1 if left else -2, b.shard_bounds, solve))
    solver = root_solver(moment, shape, b.options, is_split)
    if solver is None:
        return orthogonalize(moment, b.options)
    gram = _gram(moment, left)
    root = yield SolveRoot(gram, solver, is_split)
    x = root.root.to(moment.dtype)
    factor = x @ moment if left else moment @ x
    # 0·NaN is NaN: the zero root of a matrix that is not finite does not silence it.
    broken = ~torch.isfinite(gram.diagonal(dim1=-2, dim2=-1).sum(-1))[:, None, None]
    return Polar(factor.masked_fill_(broken, 0.0), root.singular_values, root.effective_rank, root.fallbacks)


def prefers_gather(length: int, rank: int, ranks: int) -> bool:
    """Return True if gathering a moment costs less than reducing its Gram: 8·length·r/W against 12r² bytes."""
    return 2 * length < 3 * rank * ranks


def _gram(moment: Tensor, left: bool) -> Tensor:
    # A function of its own, so that the fp64 copy does not outlive it.
    wide = moment.double()
    return wide @ wide.mT if left else wide.mT @ wide
