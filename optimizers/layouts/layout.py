"""What the optimizer asks of a layout: how matrices lie on this process, and in which lanes they are stepped."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from optimizers.fused_projections import Block
from optimizers.layouts.communicator import Communicator
from optimizers.layouts.lanes import Lane, compensation
from optimizers.layouts.rows import Rows
from optimizers.members import Holding, Member
from optimizers.rules.rule import Rule


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
    def rows(self) -> Rows:
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

    def holding(self, parameter: Tensor, block: Block) -> Holding:
        """How a matrix lies here.

        Raises:
            TypeError: it cannot be stepped in this layout; says why.
        """
        ...

    def lanes(self, members: Sequence[Member], rule: Rule, options: Mapping[str, Any]) -> list[Lane]:
        """The lanes of a unit's matrices, the same on all processes."""
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
    member: Member, rule: Rule, options: Mapping[str, Any], in_fp32: bool = False
) -> dict[str, tuple[int, ...]]:
    """kind → shape of a matrix' state on this process, with what stays with the weights.

    Args:
        in_fp32: the weights that are stepped are fp32, whatever the parameter's dtype is.
    """
    shapes, holding = rule.state(member.block.shape, options), member.holding
    if holding.split is not None:
        axes = rule.axes(member.block.shape, options)
        here = holding.shape[holding.split]
        shapes = {
            kind: tuple(here if axis == holding.split else size for size, axis in zip(shape, axes[kind]))
            for kind, shape in shapes.items()
        }
    return shapes if in_fp32 else {**shapes, **compensation(member, options)}


def whole_groups(groups: Sequence[Mapping[str, Any]]) -> list[StepUnit]:
    """Each parameter group as one unit."""
    return [StepUnit(i, i, list(range(len(group["params"])))) for i, group in enumerate(groups)]
