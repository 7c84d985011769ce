"""The matrices of a stack, and how this process holds each of them: whole, or an interval of its rows or
columns."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from optimizers.fused_projections import Block


class Holding(Protocol):
    """Where a matrix (a block of a parameter) lies on this process.

    Attributes:
        split: axis of which this process holds an interval (0 rows, 1 columns); None: it holds the matrix whole.
        start: where the interval begins.
        shape: (rows, columns) here; equal to the block's shape where nothing is split.
        pattern: where the matrix is split: who holds which interval. None: nobody else holds a part.
    """

    @property
    def split(self) -> int | None:
        """See above."""
        ...

    @property
    def start(self) -> int:
        """See above."""
        ...

    @property
    def shape(self) -> tuple[int, int]:
        """See above."""
        ...

    @property
    def pattern(self) -> Hashable:
        """See above."""
        ...

    def gradient(self, parameter: Tensor, block: Block) -> Tensor | None:
        """The gradient here, `shape`; None where there is none."""
        ...

    def weight(self, parameter: Tensor, block: Block) -> Tensor:
        """The weights here as a view: `shape`, or 3-D where a fused projection is interleaved."""
        ...

    def elements(self, parameter: Tensor, block: Block) -> Tensor | None:
        """The gradient's elements that lie here, in any shape; None where there is none."""
        ...

    def part(self, local: Tensor, block: Block) -> Tensor | None:
        """The matrix' interval of a tensor that lies as the parameter does here (AdamW's state); None where it
        breaks rows."""
        ...


@dataclass(frozen=True)
class Held:
    """An ordinary parameter, whole."""

    shape: tuple[int, int]
    split: int | None = None
    start: int = 0
    pattern: Hashable = None

    def gradient(self, parameter: Tensor, block: Block) -> Tensor | None:
        """The block of `parameter.grad`."""
        return None if parameter.grad is None else block.matrix(parameter.grad)

    def weight(self, parameter: Tensor, block: Block) -> Tensor:
        """The block of the parameter."""
        return block.view(parameter)

    def elements(self, parameter: Tensor, block: Block) -> Tensor | None:
        """The block as a view, which may be interleaved."""
        return None if parameter.grad is None else block.view(parameter.grad)

    def part(self, local: Tensor, block: Block) -> Tensor | None:
        """The block of it."""
        return block.matrix(local)


@dataclass(frozen=True)
class Member:
    """One matrix of a stack: a block of a parameter."""

    parameter: Tensor
    block: Block
    prefix: str  # of its keys in the parameter's state: "" or "q."
    offset: int  # added to t when a refresh is decided
    holding: Holding

    @property
    def unit(self) -> tuple[int, str]:
        """What it is called in a `StepMask`."""
        return id(self.parameter), self.prefix

    @property
    def is_stepped(self) -> bool:
        """Whether there is a gradient."""
        return self.gradient() is not None

    def key(self, kind: str) -> str:
        """Name of a state tensor in the parameter's state."""
        return self.prefix + kind

    def gradient(self) -> Tensor | None:
        """(rows, columns) here; None where there is none."""
        return self.holding.gradient(self.parameter, self.block)

    def weight(self) -> Tensor:
        """View of the weights here."""
        return self.holding.weight(self.parameter, self.block)


def compute_dtype(parameter: Tensor) -> torch.dtype:
    """fp64 for fp64 weights, else fp32: the dtype of moments, bases, spectra and updates."""
    return torch.float64 if parameter.dtype == torch.float64 else torch.float32
