"""What can be read off an optimizer: spectra, figures, bytes."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from optimizers.linalg.polar import polar
from optimizers.linalg.precision import full_precision
from optimizers.linalg.spectra import figures, orthogonality_error, polar_error

Figures = dict[str, Tensor]


def singular_values(moment: Tensor) -> Tensor:
    """(b, m, n) → (b, min(m, n)) descending, in the moment's dtype; from the fp64 Gram, so accurate above
    1e-6 σ1."""
    wide = moment.detach().double()
    with full_precision(moment.device.type):
        gram = wide @ wide.mT if wide.shape[-2] <= wide.shape[-1] else wide.mT @ wide
        # eigvalsh raises on NaN; a moment that holds one has no spectrum.
        finite = torch.isfinite(gram).all(-1).all(-1)[:, None]
        values = torch.linalg.eigvalsh(torch.where(finite[..., None], gram, 0.0))
    return torch.where(finite, values.clamp_min(0).sqrt().flip(-1), torch.nan).to(moment.dtype)


def figures_of(
    names: Sequence[str], moment: Tensor, factor: Tensor | None = None, known: Tensor | None = None
) -> dict[str, Figures]:
    """Name → figures of a stack of moments, and of the factors that were applied to them.

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
    found = figures(values, moment.shape, moment.dtype)
    columns["condition_number"] = found.condition_number.double()
    columns["effective_rank"] = found.effective_rank.double()
    columns["stable_rank"] = found.stable_rank.double()
    if factor is not None:
        columns["orthogonality_error"] = orthogonality_error(factor)
    return {name: {key: column[i] for key, column in columns.items()} for i, name in enumerate(names)}


class Observation:
    """The figures of one observed step, and the time that they took."""

    def __init__(self) -> None:
        self.figures: dict[str, Figures] = {}
        self._host_seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def add(
        self, names: Sequence[str], moment: Tensor, factor: Tensor | None = None, known: Tensor | None = None
    ) -> None:
        """`figures_of` a stack, with the clock running: device time on CUDA, where the host runs ahead."""
        if moment.device.type != "cuda":
            begin = time.perf_counter()
            self.figures.update(figures_of(names, moment, factor, known))
            self._host_seconds += time.perf_counter() - begin
            return
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        first.record()
        self.figures.update(figures_of(names, moment, factor, known))
        last.record()
        self._events.append((first, last))

    def seconds(self) -> float:
        """Seconds that the figures took. Waits for the device."""
        for first, last in self._events:
            last.synchronize()
            self._host_seconds += first.elapsed_time(last) * 1e-3
        self._events = []
        return self._host_seconds


def kind_bytes(state: Mapping[str, Any]) -> dict[str, int]:
    """Kind → bytes of a parameter's state tensors ("q.moment" counts as "moment")."""
    total: dict[str, int] = {}
    for key, value in state.items():
        if isinstance(value, Tensor):
            kind = key.rpartition(".")[2]
            total[kind] = total.get(kind, 0) + value.numel() * value.element_size()
    return total
