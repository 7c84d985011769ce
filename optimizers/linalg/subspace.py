"""Orthonormal bases of a gradient's leading singular subspace: exact, or by a randomized range finder; also on shards.

The algorithms that run on shards are generators of `linalg.requests`, with their communication left out. Bases carry
canonical signs: where a moment is reused in a new basis without transport, the next steps depend on the arbitrary signs
of singular vectors, so they are fixed here, once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Generator, Sequence
from typing import Any

import torch
from torch import Tensor

from optimizers.linalg.counter_normals import counter_normals
from optimizers.linalg.dwh import root_above_cut
from optimizers.linalg.inverse_root import root_by_eigh
from optimizers.linalg.requests import AllGather, AllReduce, Eigh, answer_alone, drive
from optimizers.linalg.robust import (
    GRAM_RTOL,
    cleaned,
    default_rtol,
    finite_matrices,
    flattened,
    full_precision,
    host_may_look,
    robust_eigh,
)

# Pivots of a Cholesky factor that span more than this leave too few digits: the eigenvalue branch takes over.
_PIVOT = 1e-7

Steps = Generator[AllReduce | AllGather | Eigh, Any, Tensor]
"""A basis in the making; returns (b, rows, rank)."""


def canonical_signs(basis: Tensor) -> Tensor:
    """Flip columns so that the component of largest absolute value is positive.

    Of components that tie within 16 eps the one with the lowest index decides, so that rounding does not.
    Zero columns stay zero.

    Args:
        basis: (…, n, r).
    """
    if basis.shape[-2] == 0:
        return basis
    size = basis.abs()
    top = size.amax(-2, keepdim=True)
    tied = size >= top * (1.0 - 16.0 * torch.finfo(basis.dtype).eps)
    index = torch.arange(basis.shape[-2], device=basis.device)[:, None]
    first = torch.where(tied, index, basis.shape[-2]).amin(-2, keepdim=True)
    # A column that holds NaN ties nowhere; it stays what it is.
    leader = basis.gather(-2, first.clamp_max(basis.shape[-2] - 1))
    return torch.where(leader < 0, -basis, basis)


def test_matrix(
    seed: int,
    name: str,
    refresh: int,
    shape: tuple[int, ...],
    device: torch.device | str = "cpu",  # noqa: PT028
) -> Tensor:
    """Return a Gaussian sketch that depends on (seed, name, refresh) and the kind of device alone.

    No rank, layout, GPU model or generator's state changes it. On a GPU it is made there: one CPU thread would take
    seconds for the sketches of a 7B model, and the copies would wait.

    Args:
        seed: of the run.
        name: of the parameter.
        refresh: number of the refresh.
        shape: (columns of the stored weight, rank + oversampling).
        device: where it is needed. A CPU draws from torch's generator, a GPU from `counter_normals`.

    Returns:
        fp32, on `device`.
    """
    digest = hashlib.sha256(f"{seed}/{name}/{refresh}".encode()).digest()
    key = int.from_bytes(digest[:8], "little")
    if torch.device(device).type != "cpu":
        return counter_normals(key, shape, device)
    generator = torch.Generator("cpu").manual_seed(key >> 1)
    return torch.randn(shape, generator=generator, dtype=torch.float32)


# Pytest collects functions by this prefix wherever they are imported.
test_matrix.__test__ = False  # type: ignore[attr-defined]


def svd_basis(gradient: Tensor, rank: int, side: str, rtol: float | None = None) -> Tensor:
    """Return the leading `rank` singular vectors of a gradient: exact, canonical signs, zeros below the cut.

    Through the fp64 Gram of the short side, whose eigenvectors are those vectors; never raises on data. A
    matrix that is not finite gets a zero basis.

    Args:
        gradient: (…, m, n).
        rank: number of vectors, at most min(m, n).
        side: "left" → (…, m, rank), "right" → (…, n, rank).
        rtol: cut relative to σ1; None: max(m, n)·eps. Not lower than `GRAM_RTOL`.

    Returns:
        fp32 (fp64 for fp64 input), orthonormal columns in order of descending σ; columns below the cut are
        zero.

    Raises:
        ValueError: rank outside 1 … min(m, n), or an unknown side.
    """
    _check(gradient, rank, side)
    return _svd_basis(
        gradient.detach(), rank, side == "left", basis_cut(gradient.shape, gradient.dtype, rtol)
    )


def basis_cut(shape: Sequence[int], dtype: torch.dtype, rtol: float | None = None) -> float:
    """Return the relative cut of a basis of (…, m, n) gradients: `rtol` or max(m, n)·eps, at least `GRAM_RTOL`."""
    return max(default_rtol(tuple(shape), dtype) if rtol is None else rtol, GRAM_RTOL)


def _check(gradient: Tensor, rank: int, side: str) -> None:
    if side not in ("left", "right"):
        raise ValueError(f"side must be 'left' or 'right', got {side!r}")
    if not 1 <= rank <= min(gradient.shape[-2:]):
        raise ValueError(f"rank {rank} does not fit a matrix of shape {tuple(gradient.shape[-2:])}")


def _basis_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


@torch.library.custom_op("optbench::svd_basis", mutates_args=())
def _svd_basis(gradient: Tensor, rank: int, left: bool, rtol: float) -> Tensor:
    with full_precision(gradient.device.type):
        m, n = gradient.shape[-2:]
        flat = flattened(gradient).double()
        flat = cleaned(flat, finite_matrices(flat))
        tall = flat.mT if m < n else flat
        values, vectors = _leading(tall.mT @ tall, rank)
        keep = (values > rtol**2 * values[:, :1])[:, None, :]
        if left == (m >= n):  # the wanted vectors live on the long side
            size = values.clamp_min(torch.finfo(values.dtype).tiny).sqrt()[:, None, :]
            vectors = tall @ vectors / size
        vectors = torch.where(keep, vectors, 0.0).to(_basis_dtype(gradient.dtype))
        return canonical_signs(vectors).reshape(*gradient.shape[:-2], m if left else n, rank).contiguous()


@_svd_basis.register_fake
def _(gradient: Tensor, rank: int, left: bool, rtol: float) -> Tensor:
    side = gradient.shape[-2 if left else -1]
    return gradient.new_empty(*gradient.shape[:-2], side, rank, dtype=_basis_dtype(gradient.dtype))


def _leading(gram: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return the largest `rank` eigenvalues, descending and not negative, and their vectors."""
    values, vectors, _ = robust_eigh(gram)
    return values.flip(-1)[:, :rank].clamp_min(0.0), vectors.flip(-1)[:, :, :rank]


def randomized_basis(
    gradient: Tensor,
    rank: int,
    side: str,
    test: Tensor,
    passes: int = 1,
    warm: Tensor | None = None,
    rtol: float | None = None,
    canonical: bool = True,
) -> Tensor:
    """Compute leading singular vectors by a randomized range finder with power passes and a warm start.

    N. Halko, P. Martinsson and J. Tropp, SIAM Review 53(2), 2011, Algorithms 4.4 and 5.1; orthonormalized by
    CholeskyQR2 on fp64 Grams (Y. Yamamoto et al., ETNA 44, 2015), by eigenvalues where that breaks down. A
    rank-deficient sketch yields exact zero columns, not arbitrary directions. The algorithm itself is
    `range_finder`, which also runs on shards.

    Never raises on data: a matrix that is not finite gets a zero basis, and no other of the stack notices.

    Args:
        gradient: (…, m, n).
        rank: at most min(m, n).
        side: "left" → (…, m, rank), "right" → (…, n, rank).
        test: (…, n, rank + oversampling) Gaussian (`test_matrix`), broadcast over the stack.
        passes: how often the sketch is multiplied by the gradient and back. "left" starts from one product
            with the gradient and may have 0 passes; "right" needs 1.
        warm: previous basis on the same side; its non-zero columns replace the first `rank` directions of
            the sketch.
        rtol: cut relative to σ1; None: max(m, n)·eps.
        canonical: fix the signs.

    Returns:
        fp32 (fp64 for fp64 input), orthonormal columns in order of descending (Ritz) σ, zero below the cut.
        How much energy it captures: docs/polar.md.

    Raises:
        ValueError: unknown side, rank or passes out of range, or a test matrix that does not fit.
    """
    if side not in ("left", "right"):
        raise ValueError(f"side must be 'left' or 'right', got {side!r}")
    if passes < (0 if side == "left" else 1):
        raise ValueError(f"side {side!r} needs more passes than {passes}")
    n = gradient.shape[-1]
    if test.shape[-2] != n or not 1 <= rank <= test.shape[-1] or rank > n:
        raise ValueError(
            f"rank {rank} and a test matrix {tuple(test.shape)} do not fit a gradient {tuple(gradient.shape)}"
        )
    batch = gradient.shape[:-2]
    with torch.no_grad(), full_precision(gradient.device.type):
        g = flattened(gradient.detach().to(_basis_dtype(gradient.dtype)))
        sketch = flattened(test.to(g).expand(*batch, *test.shape[-2:]))
        old = None if warm is None else flattened(warm.to(g))
        finder = range_finder(g, rank, side, sketch, passes, old, basis_cut(g.shape, g.dtype, rtol))
        basis = drive(finder, answer_alone)
        basis = canonical_signs(basis) if canonical else basis
        return basis.reshape(*batch, *basis.shape[-2:])


def range_finder(
    gradient: Tensor,
    rank: int,
    side: str,
    sketch: Tensor,
    passes: int,
    warm: Tensor | None,
    rtol: float,
    split: int | None = None,
) -> Steps:
    """Compute `randomized_basis` of a batch, or of this rank's rows or columns of one.

    Args:
        gradient: (b, m, n), fp32 or fp64; with split=0 (b, m_local, n), with split=1 (b, m, n_local).
        rank, side, passes, rtol: as for `randomized_basis`; rtol is required.
        sketch: (b, n or n_local, rank + oversampling): with split=1 this rank's rows of the whole test matrix,
            so that all layouts draw the same one.
        warm: previous basis (its local rows where it is split), or None.
        split: axis that is split over ranks; None: whole matrices.

    Returns:
        The left basis by rows where rows are split, the right one by rows where columns are, else whole and
        equal on all ranks. Signs as they come.
    """
    rows, columns = split == 0, split == 1
    if side == "right":
        block = yield from _with_warm(sketch, warm, columns)
        product = block
        for _ in range(passes):
            left = yield from orthonormal((yield AllReduce(gradient @ block, columns)), rows)
            product = yield AllReduce(gradient.mT @ left, rows)
            block = yield from orthonormal(product, columns)
        wide = product.double()
        gram = yield AllReduce(wide.mT @ wide, columns)
        values, rotation, keep = yield from _ritz(gram, rank, rtol)
        return torch.where(keep, wide @ rotation / values, 0.0).to(gradient.dtype)
    block = yield from _with_warm((yield AllReduce(gradient @ sketch, columns)), warm, rows)
    for _ in range(passes):
        left = yield from orthonormal(block, rows)
        right = yield from orthonormal((yield AllReduce(gradient.mT @ left, rows)), columns)
        block = yield AllReduce(gradient @ right, columns)
    # Twice: the first pass leaves an orthogonality error of eps32 times the sketch's condition number.
    block = yield from orthonormal((yield from orthonormal(block, rows)), rows)
    product = (yield AllReduce(gradient.mT @ block, rows)).double()
    gram = yield AllReduce(product.mT @ product, columns)
    _, rotation, keep = yield from _ritz(gram, rank, rtol)
    return torch.where(keep, block @ rotation.to(gradient.dtype), 0.0)


def sharded_svd_basis(gradient: Tensor, rank: int, side: str, rtol: float, split: int) -> Steps:
    """Compute `svd_basis` of matrices that are sharded over ranks, without gathering one.

    Through the fp64 Gram of the axis that is not split, which is a sum over ranks. That axis may be the long
    one: then 8·long² bytes travel instead of 8·short² (let the layout split the long axis).

    Args:
        gradient: (b, m_local, n) for split=0, (b, m, n_local) for split=1.
        rank, side, rtol: as for `svd_basis`; rtol is required.
    """
    wide = gradient.double()
    tall = wide if split == 0 else wide.mT
    gram = yield AllReduce(tall.mT @ tall, True)
    values, vectors, keep = yield from _ritz(gram, rank, rtol)
    if (side == "left") == (split == 0):  # the wanted vectors live on the split axis
        vectors = tall @ vectors / values
    return torch.where(keep, vectors, 0.0).to(gradient.dtype)


def sharded_canonical_signs(steps: Steps, is_split: bool, start: int) -> Steps:
    """Apply `canonical_signs` to a basis whose rows may be sharded over ranks.

    Args:
        steps: makes the basis.
        is_split: its rows are.
        start: index of this rank's first row in the whole basis.
    """
    basis = yield from steps
    size = basis.abs()
    rows = basis.shape[-2]
    own = size.amax(-2) if rows else size.new_zeros(basis.shape[0], basis.shape[-1])
    top = (yield AllGather(own)).amax(0) if is_split else own
    tied = size >= (top * (1.0 - 16.0 * torch.finfo(basis.dtype).eps))[:, None, :]
    # fp64 holds any index exactly, so that index and sign travel in one tensor. A column that holds NaN ties
    # nowhere; it stays what it is.
    index = torch.arange(start, start + rows, device=basis.device, dtype=torch.float64)[:, None]
    if rows:
        candidates = torch.where(tied, index, torch.inf)
        first = candidates.amin(-2)
        leader = basis.gather(-2, candidates.argmin(-2, keepdim=True)).squeeze(-2).double()
    else:
        first = torch.full(top.shape, torch.inf, dtype=torch.float64, device=basis.device)
        leader = torch.zeros_like(first)
    if is_split:
        leaders = yield AllGather(torch.stack([first, leader]))
        best = leaders[:, 0].argmin(0, keepdim=True)
        leader = leaders[:, 1].gather(0, best).squeeze(0)
    return torch.where((leader < 0)[:, None, :], -basis, basis)


def orthonormal(block: Tensor, is_split: bool) -> Steps:
    """Run one CholeskyQR pass over the columns of (b, L, k), whose rows may be sharded over ranks.

    Columns are scaled to length 1 first. Where Cholesky breaks down (dependent columns) the block is
    multiplied by the pseudo-inverse square root of its Gram instead: columns with the same span, with BᵀB a
    projector. Both are smooth maps of the summed Gram, so that every rank may compute them for itself.
    """
    wide = block.double()
    gram = yield AllReduce(wide.mT @ wide, is_split)
    finite = finite_matrices(gram)
    gram, block = cleaned(gram, finite), cleaned(block, finite)
    length = gram.diagonal(dim1=-2, dim2=-1).clamp_min(0.0).sqrt()
    inverse = torch.where(length > 0, 1.0 / length, 0.0)
    gram = gram * inverse[:, :, None] * inverse[:, None, :]
    factor, info = torch.linalg.cholesky_ex(gram)
    pivots = factor.diagonal(dim1=-2, dim2=-1)
    broken = (info != 0) | ~(pivots.amin(-1) > _PIVOT * pivots.amax(-1))
    identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    safe = torch.where(broken[:, None, None], identity, factor)
    transform = torch.linalg.solve_triangular(safe.mT, identity.expand_as(safe), upper=True)
    if host_may_look(gram):
        again = broken.nonzero().squeeze(-1)
        if again.numel():
            transform = transform.index_copy(0, again, root_by_eigh(gram[again], GRAM_RTOL)[0])
    elif gram.device.type != "meta":  # plans: this path makes no traffic
        # For all, since the host cannot know which: a refresh takes a few of them, against thousands of steps' roots.
        root = root_above_cut(gram, GRAM_RTOL).root
        transform = torch.where(broken[:, None, None], root, transform)
    return block @ (inverse[:, :, None] * transform).to(block.dtype)


def _with_warm(sketch: Tensor, warm: Tensor | None, is_split: bool) -> Steps:
    if warm is None:
        return sketch
    rank = warm.shape[-1]
    used = (yield AllReduce(warm.square().sum(-2, keepdim=True), is_split)) > 0
    return torch.cat([torch.where(used, warm, sketch[..., :rank]), sketch[..., rank:]], -1)


def _ritz(gram: Tensor, rank: int, rtol: float) -> Generator[Eigh, Any, tuple[Tensor, Tensor, Tensor]]:
    """Return leading singular values (b, 1, rank), rotation (b, k, rank), and which are above the cut (b, 1, rank)."""
    values, vectors = yield Eigh(cleaned(gram, finite_matrices(gram)))
    values = values.flip(-1)[:, None, :rank].clamp_min(0.0)
    keep = values > rtol**2 * values[..., :1]
    return torch.where(keep, values, 1.0).sqrt(), vectors.flip(-1)[..., :rank], keep
