"""From the step inside a subspace to the update of the whole matrix: what becomes of the gradient outside it."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from optimizers.interfaces import AllReduce, InTurn, LowRank, MatrixBatch, Steps, Update
from optimizers.linalg.random_bases import coin, refresh_key
from optimizers.rules.parts.building_blocks import momentum, orthogonalize, scale
from optimizers.rules.parts.inner_rules import InnerStep
from optimizers.rules.parts.norms import (
    frobenius_norm,
    growth_factor,
    limit_growth,
    limits_growth,
    limits_whole_update,
)
from optimizers.rules.parts.subspace_shapes import rank_of
from optimizers.rules.parts.subspaces import is_contracted, is_left, lift, moment_is_split, refresh_number

NORM_FLOOR = 1e-8
"""Added to ‖Ĝ‖ where it divides, as in the public codes of Fira and APOLLO; their papers have none."""


def compose(b: MatrixBatch, q: Tensor, projected: Tensor, step: InnerStep) -> Steps[Tensor | LowRank]:
    """Return the update α(Q N + residual), or α φ·G with `gradient_scaling`.

    Args:
        b: the batch.
        q: Q.
        projected: Ĝ; overwritten.
        step: N.
    """
    options = b.options
    if options["gradient_scaling"] != "none" or options["residual"] == "scaled":
        return (yield from _scaled(b, q, projected, step))
    if limits_whole_update(options):
        return (yield from _limited(b, q, projected, step))
    if isinstance(step.size, Tensor) and options["residual"] == "drop":
        return lift(b, q, step.direction.mul_(step.size))
    # α (ρ(G - QĜ) + Q N) as αρG + Q(αN - αρĜ), which never forms the residual.
    rho = options["alpha"] * options["residual_scale"]
    moved = projected.mul_(-rho)
    if isinstance(step.size, Tensor):
        moved.add_(step.direction.mul_(step.size))
    else:
        moved.add_(step.direction, alpha=step.size)
    return lift(b, q, moved, keep=rho)


def _limited(b: MatrixBatch, q: Tensor, projected: Tensor, step: InnerStep) -> Steps[Tensor]:
    """Return the same with a limiter on what only exists as a whole matrix; one batch after the other forms it."""
    yield InTurn()
    rho = b.options["residual_scale"]
    residual = lift(b, q, -rho * projected, keep=rho).dense(b)
    residual = yield from limit_growth(b, "residual", residual)
    total = lift(b, q, step.size * step.direction).dense(b).add_(residual)
    return (yield from limit_growth(b, "total", total)).mul_(b.options["alpha"])


def _scaled(b: MatrixBatch, q: Tensor, projected: Tensor, step: InnerStep) -> Steps[LowRank]:
    """Return Q N + ρ φ·(G - QĜ) (Fira, arXiv 2410.01623, eq. 7 and 8) or φ·G (APOLLO, arXiv 2412.05270, Algorithm 1).

    φ is ‖N‖/‖Ĝ‖ of each column (row) of Ĝ, which is a column (row) of G, or of the whole matrix. The limiter looks at
    φ·(G - QĜ) or φ·G. Of G it needs the norms of columns only: ‖G_j - QĜ_j‖² = ‖G_j‖² - ‖Ĝ_j‖², since Q is orthonormal.
    """
    options = b.options
    along = -2 if is_left(b) else -1  # the axis of Ĝ that the subspace spans
    recovers = options["gradient_scaling"] == "none"
    # Differences of squares want fp64. On a CPU such sums take a fifth of the time of torch's norms along columns.
    precision = torch.float64 if recovers else b.dtype
    inside = projected.square().sum(along, keepdim=True, dtype=precision)
    if options["gradient_scaling"] == "tensor":
        size = yield from frobenius_norm(step.direction, moment_is_split(b))
        whole = yield from frobenius_norm(projected, moment_is_split(b))
        ratio = (size / (whole + NORM_FLOOR))[:, None, None]
    else:
        size = step.direction.square().sum(along, keepdim=True).sqrt()
        ratio = size / (inside.to(size.dtype).sqrt() + NORM_FLOOR)
    if limits_growth(options, "residual" if recovers else "total"):
        by_matrix = options["gradient_scaling"] == "tensor"
        squares = b.squares((-2, -1) if by_matrix else along, precision)
        squares = (yield AllReduce(squares, b.split is not None if by_matrix else is_contracted(b))).double()
        if recovers:
            squares = (squares - inside).clamp_min_(0.0)
        square = (ratio.double().square() * squares).sum((-2, -1))
        square = yield AllReduce(square, moment_is_split(b) and not by_matrix)
        ratio = ratio * growth_factor(b, square.sqrt().to(ratio.dtype))[:, None, None]
    if not recovers:
        nothing = lift(b, q[..., :0], projected[..., :0, :] if is_left(b) else projected[..., :0])
        return replace(nothing, keep=ratio * step.size)
    keep = ratio * (options["residual_scale"] * step.size)
    return replace(lift(b, q, step.direction.mul_(step.size).sub_(keep * projected)), keep=keep)


def sampled_full_rank(b: MatrixBatch, q: Tensor, projected: Tensor) -> Update:
    """Take a step of GUM (arXiv 2510.17802): each matrix spends a period in its subspace or, by chance, outside.

    in:  R ← μR + Ĝ/(1 - q),          ΔW = α s Q·orth(R)
    out: R ← μR + (G - QĜ)/q,         ΔW = α s·orth(R)

    so that the mean of what enters R is G. Which matrices are out is a function of seed, name and period: every process
    knows it without communication. R begins at 0 in each period; a period inside uses a part of the moment's memory.
    """
    options, left = b.options, is_left(b)
    probability, rank = options["full_rank_probability"], rank_of(b.shape, options)
    out = [
        coin(
            refresh_key(
                options["seed"], matrix.block.name, refresh_number(step, options, matrix.offset), "full rank"
            ),
            probability,
        )
        for matrix, step in zip(b.matrices, b.steps)
    ]
    inside = (slice(None), slice(None, rank)) if left else (slice(None), slice(None), slice(None, rank))
    entering = torch.zeros_like(b.state["moment"])
    for i, is_out in enumerate(out):
        if is_out:
            entering[i] = (b.gradient[i] - _lifted(q[i], projected[i], left)) / probability
        else:
            entering[inside][i] = projected[i] / (1.0 - probability)
    moment = momentum(b, entering, overwrites=True)
    delta, fallbacks = torch.zeros_like(moment), torch.zeros((), dtype=torch.int64, device=moment.device)
    factor = torch.zeros_like(moment)
    for wanted, moments in ((True, moment), (False, moment[inside])):
        positions = [i for i, is_out in enumerate(out) if is_out == wanted]
        if not positions:
            continue
        chosen = torch.stack([moments[i] for i in positions])
        if wanted:
            # R has no part in the subspace but rounding, of the size of G: a factor would make directions of it.
            bases = torch.stack([q[i] for i in positions])
            chosen -= _lifted(bases, bases.mT @ chosen if left else chosen @ bases, left)
        o = orthogonalize(chosen, options)
        fallbacks = fallbacks if o.fallbacks is None else fallbacks + o.fallbacks
        size = options["alpha"] * scale(
            options["update_scale"], b.shape, b.fans, min(b.shape) if wanted else rank
        )
        for i, one in zip(positions, o.factor):
            if wanted:
                factor[i], delta[i] = one, one * size
            else:
                factor[inside][i] = one
                delta[i] = _lifted(q[i], one, left) * size
    return Update(delta, moment, factor, None, fallbacks)


def _lifted(q: Tensor, moved: Tensor, left: bool) -> Tensor:
    return q @ moved if left else moved @ q.mT  # of one matrix or of several
