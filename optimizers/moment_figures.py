"""Spectra and condition figures of moments, whole or split over processes, and errors of the applied factors."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from optimizers.interfaces import Collectives
from optimizers.linalg.inverse_root import inverse_root
from optimizers.linalg.polar import polar
from optimizers.linalg.robust import (
    default_rtol,
    full_precision,
)
from optimizers.linalg.spectra import figures, orthogonality_error, polar_error
from optimizers.rule import Rule

Figures = dict[str, Tensor]


class Share(NamedTuple):
    """A moment of which this process holds an interval only.

    Attributes:
        shape: (m, n) of the whole moment.
        dim: dimension that is split, -2 or -1.
        total: sums tensors over the ranks that hold the rest, a collective.
    """

    shape: tuple[int, int]
    dim: int
    total: Callable[[Sequence[Tensor]], list[Tensor]]

    def of_shape(self, part: Tensor) -> Share:
        """Return how a part of another moment is split, whose split dimension is as long as this one's.

        A rule may orthogonalize a submatrix of its moment, with all of the split dimension.
        """
        m, n = self.shape
        shape = (m, part.shape[-1]) if self.dim == -2 else (part.shape[-2], n)
        return self._replace(shape=shape)

    def gram(self, part: Tensor) -> Tensor:
        """Return the complete (b, u, u) fp64 Gram over the split dimension; u is the length of the other one."""
        wide = part.detach().double()
        with full_precision(part.device.type):
            return self.total([wide.mT @ wide if self.dim == -2 else wide @ wide.mT])[0]

    def times(self, part: Tensor, root: Tensor) -> Tensor:
        """Return this process' interval of the moment times a symmetric (b, u, u) matrix."""
        wide = part.detach().double()
        return wide @ root if self.dim == -2 else root @ wide


def moment_share(
    rule: Rule,
    shape: tuple[int, int],
    split: int | None,
    options: Mapping[str, Any],
    collectives: Collectives,
) -> Share | None:
    """Return how the moment of an (m, n) matrix is split where the matrix is split along `split`, or None."""
    if split is None:
        return None
    kind = rule.observed(shape, options)
    if kind is None:
        return None
    along = rule.axes(shape, options)[kind]
    if split not in along:
        return None
    m, n = rule.state(shape, options)[kind]
    return Share((m, n), along.index(split) - 2, collectives.all_reduce)


def singular_values(moment: Tensor, share: Share | None = None) -> Tensor:
    """Return the singular values (b, min(m, n)) of moments (b, m, n), descending, in the moment's dtype (fp32 of
    a narrower one).

    They come from the fp64 Gram, so they are accurate above 1e-6 σ1. With `share`, each rank holds an interval of the
    moment, and the call is a collective.
    """
    if share is not None:
        return _values(share.gram(moment), moment.dtype)[..., : min(share.shape)]
    wide = moment.detach().double()
    with full_precision(moment.device.type):
        gram = wide @ wide.mT if wide.shape[-2] <= wide.shape[-1] else wide.mT @ wide
    return _values(gram, moment.dtype)


def _values(gram: Tensor, dtype: torch.dtype) -> Tensor:
    with full_precision(gram.device.type):
        # eigvalsh raises on NaN; a moment that holds one has no spectrum.
        finite = torch.isfinite(gram).all(-1).all(-1)[:, None]
        values = torch.linalg.eigvalsh(torch.where(finite[..., None], gram, 0.0))
    return torch.where(finite, values.clamp_min(0).sqrt().flip(-1), torch.nan).to(
        torch.promote_types(dtype, torch.float32)
    )


def figures_of(
    names: Sequence[str], moment: Tensor, factor: Tensor | None = None, known: Tensor | None = None
) -> dict[str, Figures]:
    """Return name → figures of a batch of moments, and of the factors that were applied to them.

    Args:
        names: of the b matrices.
        moment: (b, m, n) what was orthogonalized or normalized.
        factor: (b, m, n) what came out; None: the rule applies none.
        known: (b, k) singular values of `moment` where the rule has them: then the rule's factor is exact,
            and it is judged by an exact factor found another way.
    """
    columns: dict[str, Tensor] = {}
    if factor is None:
        values = singular_values(moment) if known is None else known
    elif known is None:
        exact = polar(moment, "gram")
        values = exact.singular_values
        k = min(moment.shape[-2:])
        difference = factor.double() - exact.factor.double()
        columns["polar_error"] = torch.linalg.matrix_norm(difference) / k**0.5
    else:
        values = known
        columns["polar_error"] = polar_error(factor, moment)
    assert values is not None
    columns |= _spectral_columns(values, moment.shape, moment.dtype)
    if factor is not None:
        columns["orthogonality_error"] = orthogonality_error(factor)
    return _by_name(names, columns)


def split_figures_of(
    names: Sequence[str], moment: Tensor, factor: Tensor | None, known: Tensor | None, share: Share
) -> dict[str, Figures]:
    """Return `figures_of` for moments of which each rank holds an interval, from Grams alone (a collective).

    The exact factor that judges the applied one is M (MᵀM)^(-1/2) by eigendecomposition of the fp64 Gram.
    """
    gram = share.gram(moment)
    values = _values(gram, moment.dtype)[..., : min(share.shape)] if known is None else known
    columns = _spectral_columns(values, share.shape, moment.dtype)
    if factor is not None:
        k = min(share.shape)
        exact = share.times(moment, inverse_root(gram, default_rtol(share.shape, moment.dtype)).root)
        distance = share.total([(factor.double() - exact).square().sum((-2, -1))])[0]
        columns["polar_error"] = (distance / k).sqrt()
        square = share.gram(factor)
        trace = square.diagonal(dim1=-2, dim2=-1).sum(-1)
        # ‖OOᵀ - I‖² on either side: the two Grams share their non-zero eigenvalues.
        excess = square.square().sum((-2, -1)) - 2 * trace + k
        columns["orthogonality_error"] = (excess.clamp_min(0.0) / k).sqrt()
    return _by_name(names, columns)


def _spectral_columns(values: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Tensor]:
    spectral = figures(values, shape, dtype)
    return {
        "condition_number": spectral.condition_number.double(),
        "effective_rank": spectral.effective_rank.double(),
        "stable_rank": spectral.stable_rank.double(),
    }


def _by_name(names: Sequence[str], columns: dict[str, Tensor]) -> dict[str, Figures]:
    return {name: {key: column[i] for key, column in columns.items()} for i, name in enumerate(names)}


class Observation:
    """The figures of one observed step, and the time that they took.

    Args:
        around: gives a context for each computation.
    """

    def __init__(self, around: Callable[[], AbstractContextManager[object]] = nullcontext) -> None:
        self.figures: dict[str, Figures] = {}
        self._around = around
        self._host_seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def add(
        self,
        names: Sequence[str],
        moment: Tensor,
        factor: Tensor | None = None,
        known: Tensor | None = None,
        share: Share | None = None,
    ) -> None:
        """Add `figures_of` a batch (with `share`, of split moments), and time them: on CUDA, where the host runs ahead,
        by events."""

        def compute() -> dict[str, Figures]:
            with self._around():
                if share is None:
                    return figures_of(names, moment, factor, known)
                return split_figures_of(names, moment, factor, known, share)

        if moment.device.type != "cuda":
            begin = time.perf_counter()
            self.figures.update(compute())
            self._host_seconds += time.perf_counter() - begin
            return
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        first.record()
        self.figures.update(compute())
        last.record()
        self._events.append((first, last))

    def seconds(self) -> float:
        """Return the seconds that the figures took. Waits for the device."""
        for first, last in self._events:
            last.synchronize()
            self._host_seconds += first.elapsed_time(last) * 1e-3
        self._events = []
        return self._host_seconds
