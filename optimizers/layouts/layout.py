"""What the optimizer asks of a layout: how matrices lie on this process, and in which buckets they are stepped."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from optimizers.fused_projections import Block
from optimizers.interfaces import Collectives, LocalView, MatrixRef, Rule
from optimizers.layouts.batches import compensation
from optimizers.layouts.buckets import Bucket
from optimizers.layouts.communicator import Communicator


class StepUnit(NamedTuple):
    """Parameters that one call of `step` updates: a group, or part of one.

    Attributes:
        key: names it.
        group: index of the group.
        positions: of its parameters in the group, as the optimizer was given it.
    """

    key: Hashable
    group: int
    positions: list[int]


class Layout(Protocol):
    """How parameters lie on the processes."""

    @property
    def collectives(self) -> Collectives:
        """Sums over the processes that hold the rest of what lies here."""
        ...

    @property
    def is_divided(self) -> bool:
        """Whether processes keep the state of different matrices, or of different parts of them."""
        ...

    @property
    def is_first_replica(self) -> bool:
        """Whether this process writes what several of them hold alike."""
        ...

    def interval(self, parameter: Tensor) -> tuple[int | None, int]:
        """(dimension, start) of what `weight` is: dimension None: all of it; -1: of its flattened elements."""
        ...

    @property
    def communicators(self) -> list[Communicator]:
        """What counts the bytes that this process sends for the optimizer."""
        ...

    def local_view(self, parameter: Tensor, block: Block) -> LocalView:
        """How a matrix lies here.

        Raises:
            TypeError: it cannot be stepped in this layout; says why.
        """
        ...

    def buckets(self, matrices: Sequence[MatrixRef], rule: Rule, options: Mapping[str, Any]) -> list[Bucket]:
        """The buckets of a unit's matrices, the same on all processes."""
        ...

    def step_units(self, groups: Sequence[Mapping[str, Any]]) -> Iterable[StepUnit]:
        """What is to be stepped now, with these parameter groups."""
        ...

    def all_step_units(self, groups: Sequence[Mapping[str, Any]]) -> Iterable[StepUnit]:
        """What is stepped in a whole optimizer step."""
        ...

    def check(self, named: Sequence[tuple[str, Tensor]]) -> None:
        """Refuse parameters that lie unlike those that the layout was built for.

        Raises:
            TypeError: naming the parameter.
        """
        ...

    def agree(self, unit: StepUnit, flags: Tensor) -> Tensor:
        """(k,) bool of gradients of which this process may hold a part → element-wise or over all that hold parts: a
        collective where there are several."""
        ...

    def weight(self, parameter: Tensor) -> Tensor:
        """A parameter's elements here, for element-wise updates: a view."""
        ...

    def gradient(self, parameter: Tensor) -> Tensor | None:
        """The gradient of these elements."""
        ...


def local_shapes(
    matrix: MatrixRef, rule: Rule, options: Mapping[str, Any], in_fp32: bool = False
) -> dict[str, tuple[int, ...]]:
    """kind → shape of a matrix' state on this process, with what stays with the weights.

    Args:
        in_fp32: the weights that are stepped are fp32, whatever the parameter's dtype is.
    """
    shapes, view = rule.state(matrix.block.shape, options), matrix.view
    if view.split is not None:
        axes = rule.axes(matrix.block.shape, options)
        here = view.shape[view.split]
        shapes = {
            kind: tuple(here if axis == view.split else size for size, axis in zip(shape, axes[kind]))
            for kind, shape in shapes.items()
        }
    return shapes if in_fp32 else {**shapes, **compensation(matrix, options)}


def whole_groups(groups: Sequence[Mapping[str, Any]]) -> list[StepUnit]:
    """Each parameter group as one unit."""
    return [StepUnit(i, i, list(range(len(group["params"])))) for i, group in enumerate(groups)]
