"""State in terms of names and intervals, whatever the layout: saved on one engine and world size, loaded on
another."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from optimizers import rules
from optimizers.layouts.lanes import SplitLane
from optimizers.members import Member
from optimizers.rules.rule import Rule
from optimizers.stacks import Bank

if TYPE_CHECKING:
    from optimizers.base import Optimizer

FLAT = -1
"""As `StatePiece.dim`: the interval counts elements of the flattened tensor."""


class StatePiece(NamedTuple):
    """This process' part of one state tensor.

    Attributes:
        name: of the matrix ("layers.0.qkv.weight[q]"), or of the parameter under AdamW.
        kind: "moment", "basis", …
        shape: of the whole tensor.
        dim: dimension that is split, `FLAT`, or None where the tensor is here whole.
        start: where this part begins along `dim`.
        tensor: the part, a view of the optimizer's own memory.
        is_primary: whether this process is the one to write it; others hold the same numbers.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    dim: int | None
    start: int
    tensor: Tensor
    is_primary: bool

    def of(self, whole: Tensor) -> Tensor:
        """This part of the whole tensor, as a view of it.

        Raises:
            ValueError: it has another shape.
        """
        if tuple(whole.shape) != self.shape:
            raise ValueError(
                f"{self.name}: {self.kind} has shape {tuple(whole.shape)}, expected {self.shape}"
            )
        if self.dim is None:
            return whole
        if self.dim == FLAT:
            return whole.reshape(-1)[self.start : self.start + self.tensor.numel()].view(self.tensor.shape)
        return whole.narrow(self.dim, self.start, self.tensor.shape[self.dim])


def pieces(optimizer: Optimizer) -> Iterator[StatePiece]:
    """All parts of the state that this process holds; together the processes hold all of it."""
    is_first = optimizer.is_first_replica
    for unit in optimizer.step_units():
        group = optimizer.groups[unit.group]
        if group["rule"] != "adamw":
            rule = rules.load(group["rule"])
            for lane in optimizer.lanes(unit):
                for bank in (*lane.banks, *lane.landing):
                    bank.bind(optimizer.state)
                    yield from _of_bank(bank, rule, is_first or isinstance(lane, SplitLane))
            continue
        for position in unit.positions:
            parameter = optimizer.parameters_of_groups[unit.group][position]
            name = optimizer.name_of(parameter)
            dim, start = optimizer.layout.interval(parameter)
            for kind, tensor in optimizer.state[parameter].items():
                if isinstance(tensor, Tensor):
                    yield StatePiece(
                        name,
                        kind,
                        tuple(parameter_shape(parameter)),
                        dim,
                        start,
                        tensor,
                        is_first or dim == FLAT,
                    )


def parameter_shape(parameter: Tensor) -> torch.Size:
    """Whole shape, also where ZeRO-3 has emptied the parameter."""
    return getattr(parameter, "ds_shape", parameter.shape)


def _of_bank(bank: Bank, rule: Rule, is_first: bool) -> Iterator[StatePiece]:
    shape = bank.shape
    whole = {"compensation": shape, **rule.state(shape, bank.options)}
    axes = rule.axes(shape, bank.options) if bank.split is not None and not rule.needs_whole else {}
    for kind, size in bank.shapes.items():
        along = (0, 1) if kind == "compensation" else axes.get(kind, ())
        dim = along.index(bank.split) if bank.split in along else None
        stacked = bank.stacked(kind)
        for i, member in enumerate(bank.members):
            is_primary = is_first and (dim is not None or bank.split is None or _has_first_row(member))
            yield StatePiece(
                member.block.name,
                kind,
                tuple(whole[kind]),
                dim,
                bank.start,
                stacked[i].view(size),
                is_primary,
            )


def _has_first_row(member: Member) -> bool:
    holding = member.holding
    return holding.split is None or (holding.start == 0 and holding.shape[holding.split] > 0)


def assemble(parts: Iterable[StatePiece]) -> dict[tuple[str, str], Tensor]:
    """(name, kind) → whole tensor, from the primary parts of all processes.

    Raises:
        ValueError: an element is missing, or written twice.
    """
    found: dict[tuple[str, str], Tensor] = {}
    filled: dict[tuple[str, str], int] = {}
    for part in parts:
        if not part.is_primary:
            continue
        key = part.name, part.kind
        whole = found.setdefault(key, torch.zeros(part.shape, dtype=part.tensor.dtype))
        part.of(whole).copy_(part.tensor)
        filled[key] = filled.get(key, 0) + part.tensor.numel()
    for key, whole in found.items():
        if filled[key] != whole.numel():
            raise ValueError(f"{key[0]}: {filled[key]} of {whole.numel()} elements of {key[1]} were written")
    return found


def load(optimizer: Optimizer, steps: Mapping[str, int], read: Callable[[StatePiece], Tensor]) -> None:
    """Fill the state from what was saved (a collective where matrices are split over ranks).

    Args:
        optimizer: with the same rules and options as the one that was saved.
        steps: parameter name → steps taken.
        read: part of the state here → its saved numbers, of the part's shape. From whole tensors:
            ``lambda part: part.of(whole[part.name, part.kind])``.

    Raises:
        KeyError: a parameter is not among `steps`.
    """
    parameters = [p for group in optimizer.parameters_of_groups for p in group]
    # What is frozen here and was trained there goes on from what it had.
    optimizer.start(p for p in parameters if optimizer.name_of(p) in steps)
    for parameter in filter(optimizer.has_started, parameters):
        optimizer.state[parameter]["step"] = steps[optimizer.name_of(parameter)]
    with torch.no_grad():
        for part in pieces(optimizer):
            part.tensor.copy_(read(part))
    optimizer.state_was_replaced()
