"""Measure what the update of an element depends on, by runs in one process whose inputs are cut up or exchanged.

The class explains the verdicts: flat slices need an element-wise update, row shards a row-wise one, unless the
optimizer itself gathers what it needs (or runs on DTensors, whose operations do).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from harness.errors import first_line
from harness.verify.audit.cells import LATE_STEPS, STEPS
from harness.verify.audit.document import UpdateClass
from harness.verify.audit.given_model import Given
from harness.verify.audit.oracle import errors, observe, train
from harness.verify.audit.targets import Target, TargetError

Whole = Mapping[str, Tensor]
Cut = Callable[[Whole], dict[str, Tensor]]

LOOSEST = 1e-3
"""Relative difference from which an update is another one. The runs are in fp64, so that rounding is 1e-12; some rules
compute in fp32 or bf16 inside."""
ELEMENTS_PER_PIECE = 37
"""Of the 1-D pieces, which end inside of rows."""
ROWS_PER_PIECE = 5


@dataclass(frozen=True)
class Class:
    """What the update depends on.

    Attributes:
        name: one of `document.CLASSES`.
        explanation: which probe says so, one sentence.
        axes: along which matrices can be cut without changing the update: 0 for rows, 1 for columns.
        draws: it draws random numbers.
        steps: after how many steps this shows.
    """

    name: UpdateClass
    explanation: str
    axes: tuple[int, ...] = ()
    draws: bool = False
    steps: int = STEPS


def classify(target: Target, data: Given) -> Class:
    """Return the class of a target's update.

    Args:
        target: it can take steps in one process.
        data: weights and gradients of a model, of `LATE_STEPS` steps.

    Raises:
        TargetError: no weight moves.
    """
    first = replace(data, gradients=data.gradients[:STEPS])
    if not _Prober(target, first).moves():
        if not _Prober(target, data).moves():
            raise TargetError(
                f"moves no weight within {len(data.gradients)} steps, so that nothing can be judged"
            )
        late = _classify(target, data)
        return replace(
            late, steps=LATE_STEPS, explanation=f"{late.explanation}; no weight moves before step {STEPS}"
        )
    early = _classify(target, first)
    if early.name == "elementwise" and _Prober(target, data).failure(_pieces):
        late = _classify(target, data)
        return replace(
            late, steps=LATE_STEPS, explanation=f"{late.explanation}; element-wise up to step {STEPS}"
        )
    return early


def _classify(target: Target, data: Given) -> Class:
    prober = _Prober(target, data)
    if observe(target, data.start, data.gradients).draws:
        return Class("nondeterministic", "a step draws random numbers", prober.axes(), draws=True)
    if prober.differs_when_repeated():
        return Class("nondeterministic", "two equal runs differ", prober.axes())
    name = prober.depends_on_others()
    if name:
        reason = f"the update of {name} changes with the gradients of other parameters"
        return Class("global", reason, prober.axes())
    name = prober.depends_on_order()
    if name:
        return Class(
            "global", f"the update of {name} changes with the order of the parameters", prober.axes()
        )
    failure = prober.failure(_pieces)
    if not failure:
        return Class("elementwise", "1-D pieces of the parameters are updated as the whole ones are", (0, 1))
    axes = prober.axes()
    if axes:
        cut = " and ".join("rows" if axis == 0 else "columns" for axis in axes)
        return Class(
            "rowwise", f"blocks of {cut} are updated as whole matrices are, 1-D pieces not: {failure}", axes
        )
    return Class("matrix", f"cut along rows, columns or into 1-D pieces it changes: {failure}")


class _Prober:
    def __init__(self, target: Target, data: Given) -> None:
        self.target, self.data = target, data
        try:
            self.dtype = torch.float64
            self.base = self._train(data.start, data.gradients)
        except Exception:
            self.dtype = torch.float32
            self.base = self._train(data.start, data.gradients)

    def _train(self, start: Whole, gradients: Sequence[Whole]) -> dict[str, Tensor]:
        return train(self.target, start, gradients, self.dtype)[-1]

    def moves(self) -> bool:
        """Return True if a weight changes, in fp32."""
        return any(not torch.equal(w.float(), self.data.start[name]) for name, w in self.base.items())

    def _largest(self, weights: Whole) -> tuple[float, str]:
        found = errors(self.data.start, weights, {name: self.base[name] for name in weights})
        return max((error, name) for name, error in found.items())

    def differs_when_repeated(self) -> bool:
        again = self._train(self.data.start, self.data.gradients)
        return any(not torch.equal(again[name], weight) for name, weight in self.base.items())

    def depends_on_others(self) -> str:
        """Return a parameter whose update changes with the gradients of the others, or the empty string."""
        # One matrix and one vector: a rule may treat them differently.
        kept = [next((n for n, w in self.base.items() if w.ndim == ndim), None) for ndim in (2, 1)]
        for name in filter(None, kept):
            changed = [
                {n: g if n == name else -3 * g.flip(0) for n, g in row.items()} for row in self.data.gradients
            ]
            after = self._train(self.data.start, changed)
            error, _ = self._largest({name: after[name]})
            if error > LOOSEST:
                return name
        return ""

    def depends_on_order(self) -> str:
        """Return a parameter whose update changes with the order of all, or the empty string."""
        reversed_ = dict(reversed(self.data.start.items()))
        after = self._train(reversed_, self.data.gradients)
        error, name = self._largest(after)
        return name if error > LOOSEST else ""

    def axes(self) -> tuple[int, ...]:
        """Return the dimensions along which matrices can be cut."""
        return tuple(axis for axis in (0, 1) if not self.failure(partial(_blocks, axis=axis)))

    def failure(self, cut: Cut) -> str:
        """Return how the update of cut parameters differs from the whole ones', or the empty string."""
        whole = {name: w for name, w in self.data.start.items() if name in self.base}
        gradients = [{n: g for n, g in row.items() if n in whole} for row in self.data.gradients]
        start = cut(whole)
        try:
            after = self._train(start, [cut(row) for row in gradients])
        except Exception as error:
            return f"{first_line(error)[:80]}"
        if set(after) != set(start):
            return "pieces are not taken"
        found = errors(start, after, cut(self.base))
        # Of a piece that barely moves, the error is measured against its parameter's change.
        largest, name = max((error, name) for name, error in found.items())
        return f"{name.partition('.piece')[0]} by {largest:.1e}" if largest > LOOSEST else ""


def _pieces(whole: Whole) -> dict[str, Tensor]:
    """Cut parameters into 1-D pieces that end inside of rows."""
    return {
        _piece_name(name, number): piece.clone()
        for name, tensor in whole.items()
        for number, piece in enumerate(tensor.reshape(-1).split(ELEMENTS_PER_PIECE))
    }


def _blocks(whole: Whole, axis: int) -> dict[str, Tensor]:
    """Cut matrices into blocks of rows or columns, the last one smaller; vectors stay."""
    return {
        _piece_name(name, number): piece.clone()
        for name, tensor in whole.items()
        for number, piece in enumerate(tensor.split(ROWS_PER_PIECE, axis) if tensor.ndim > 1 else [tensor])
    }


def _piece_name(name: str, number: int) -> str:
    stem, _, leaf = name.rpartition(".")
    return f"{stem}.piece{number}.{leaf}"
