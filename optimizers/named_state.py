"""Optimizer state by name, whatever the layout, and checked state dicts.

`pieces` and `load` describe the state by names and intervals: what one engine and world size saved, another loads.
torch's state dicts are exact for the same layout; `check_state_dict` refuses those of another optimizer.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from optimizers import presets, weight_average, weight_norms
from optimizers.interfaces import MatrixRef
from optimizers.interfaces import parameter_shape as parameter_shape
from optimizers.layouts.batches import BatchState
from optimizers.layouts.layout import Layout
from optimizers.layouts.owner_buckets import WorkSplitBucket
from optimizers.rule import Rule
from optimizers.rule_options import NEUTRAL
from optimizers.step_units import StepUnits

_ELEMENTWISE = {"moment", "second_moment", "compensation", weight_average.KIND}
"""State of AdamW that has the shape of its parameter."""
FLAT = -1
"""As `StatePiece.dim`: the interval counts elements of the flattened tensor."""


class StatefulOptimizer(Protocol):
    """What `pieces` and `load` ask of an optimizer; `optimizers.Optimizer` has it."""

    units: StepUnits
    state: Any

    @property
    def layout(self) -> Layout: ...

    @property
    def parameters_of_groups(self) -> list[list[Tensor]]: ...

    def name_of(self, parameter: Tensor) -> str:
        """Return the parameter's name in the model."""
        ...

    def state_was_replaced(self) -> None:
        """Take note that the numbers in `state` are no longer those of the last step."""
        ...


class StatePiece(NamedTuple):
    """This process' part of one state tensor.

    Attributes:
        name: of the matrix ("layers.0.qkv.weight[q]"), or of the parameter under AdamW.
        kind: "moment", "basis", …
        shape: of the whole tensor.
        dim: dimension that is split, `FLAT`, or None where this process holds the whole tensor.
        start: where this part begins along `dim`.
        tensor: the part, a view of the optimizer's own memory.
        is_primary: True on the process that writes it; others hold the same numbers.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    dim: int | None
    start: int
    tensor: Tensor
    is_primary: bool

    def of(self, whole: Tensor) -> Tensor:
        """Return this part of the whole tensor, as a view of it.

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


def pieces(optimizer: StatefulOptimizer) -> Iterator[StatePiece]:
    """Yield all parts of the state that this process holds; together the processes hold all of it."""
    units, layout = optimizer.units, optimizer.layout
    is_first = layout.is_first_replica
    for unit in units.all():
        group = units.group_of(unit)
        is_adamw = group.rule == "adamw"
        if not is_adamw:
            rule = presets.load_rule(group.rule)
            for bucket in units.buckets(unit):
                for batch_state in (*bucket.batch_states, *bucket.receivers):
                    batch_state.bind(optimizer.state)
                    yield from _of_batch_state(
                        batch_state, rule, is_first or isinstance(bucket, WorkSplitBucket)
                    )
        for parameter in units.parameters(unit):
            name, shape = units.name_of(parameter), tuple(parameter_shape(parameter))
            dim, start = layout.interval(parameter)
            for kind, tensor in optimizer.state[parameter].items():
                # The rest of a matrix rule's state is that of its batches.
                if isinstance(tensor, Tensor) and (
                    kind in _ELEMENTWISE if is_adamw else kind == weight_average.KIND
                ):
                    yield StatePiece(name, kind, shape, dim, start, tensor, is_first or dim == FLAT)
        if group.options.get("weight_norm", "free") != "free":
            for matrix in units.matrices(unit):
                norm = optimizer.state[matrix.parameter][matrix.key(weight_norms.KIND)]
                yield StatePiece(
                    matrix.block.name, weight_norms.KIND, (), None, 0, norm, layout.is_writer(unit)
                )


def _of_batch_state(batch_state: BatchState, rule: Rule, is_first: bool) -> Iterator[StatePiece]:
    shape = batch_state.shape
    whole = {"compensation": shape, **rule.state(shape, batch_state.options)}
    axes = (
        rule.axes(shape, batch_state.options)
        if batch_state.split is not None and not rule.needs_whole
        else {}
    )
    for kind, size in batch_state.shapes.items():
        along = (0, 1) if kind == "compensation" else axes.get(kind, ())
        dim = along.index(batch_state.split) if batch_state.split in along else None
        stacked = batch_state.stacked(kind)
        for i, matrix in enumerate(batch_state.matrices):
            is_primary = is_first and (dim is not None or batch_state.split is None or _has_first_row(matrix))
            yield StatePiece(
                matrix.block.name,
                kind,
                tuple(whole[kind]),
                dim,
                batch_state.start,
                stacked[i].view(size),
                is_primary,
            )


def _has_first_row(matrix: MatrixRef) -> bool:
    view = matrix.view
    return view.split is None or (view.start == 0 and view.shape[view.split] > 0)


def assemble(parts: Iterable[StatePiece]) -> dict[tuple[str, str], Tensor]:
    """Return (name, kind) → whole tensor, from the primary parts of all processes.

    Raises:
        ValueError: an element is missing, or written twice.
    """
    wholes: dict[tuple[str, str], Tensor] = {}
    filled: dict[tuple[str, str], int] = {}
    for part in parts:
        if not part.is_primary:
            continue
        key = part.name, part.kind
        whole = wholes.setdefault(key, torch.zeros(part.shape, dtype=part.tensor.dtype))
        part.of(whole).copy_(part.tensor)
        filled[key] = filled.get(key, 0) + part.tensor.numel()
    for key, whole in wholes.items():
        if filled[key] != whole.numel():
            raise ValueError(f"{key[0]}: {filled[key]} of {whole.numel()} elements of {key[1]} were written")
    return wholes


def load(
    optimizer: StatefulOptimizer, steps: Mapping[str, int], read: Callable[[StatePiece], Tensor]
) -> None:
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
    optimizer.units.start(p for p in parameters if optimizer.name_of(p) in steps)
    for parameter in filter(optimizer.units.has_started, parameters):
        optimizer.state[parameter]["step"] = steps[optimizer.name_of(parameter)]
    with torch.no_grad():
        for part in pieces(optimizer):
            part.tensor.copy_(read(part))
    optimizer.state_was_replaced()


# Options that shape the state or what it means; others may differ and are taken from the state dict, as torch
# does.
_STRUCTURAL = ("rule", "rank", "side", "inner", "state_dtype", "split_heads")


def check_state_dict(
    optimizer: torch.optim.Optimizer,
    state_dict: Mapping[str, Any],
    start: Callable[[Iterable[Tensor]], None],
) -> None:
    """Refuse a state dict that this optimizer could not go on from, and say why.

    Args:
        optimizer: that is to take it.
        state_dict: of an optimizer like it.
        start: gives state to parameters that are frozen here and had been trained there.

    Raises:
        ValueError: naming the group or parameter that does not fit.
    """
    saved, state = state_dict.get("param_groups"), state_dict.get("state")
    if not isinstance(saved, list) or not isinstance(state, Mapping):
        raise ValueError("not an optimizer's state dict: it lacks 'param_groups' or 'state'")
    own = optimizer.param_groups
    for i, group in enumerate(saved):
        if "rule" not in group:
            keys = ", ".join(sorted(group))
            raise ValueError(f"written by another optimizer: its group {i} names no rule (it has {keys})")
    if len(saved) != len(own):
        raise ValueError(f"has {len(saved)} parameter groups, this optimizer has {len(own)}")
    for i, (theirs, ours) in enumerate(zip(saved, own)):
        _check_group(i, theirs, ours)
    pairs = _pairs(state_dict, optimizer)
    start([parameter for identifier, parameter in pairs if state.get(identifier)])
    for identifier, parameter in pairs:
        own = optimizer.state.get(parameter)
        # A parameter that is frozen here and was frozen there.
        if own or state.get(identifier):
            _check_parameter(identifier, state.get(identifier), own or {})


def _check_group(i: int, theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    counts = len(theirs["params"]), len(ours["params"])
    if counts[0] != counts[1]:
        raise ValueError(f"group {i} has {counts[0]} parameters, this optimizer's has {counts[1]}")
    for key in _STRUCTURAL:
        # A group that was written before an option existed had what it is by default.
        default = NEUTRAL.get(key, ours.get(key))
        if theirs.get(key, default) != ours.get(key, default):
            raise ValueError(
                f"group {i} was written with {key}={theirs.get(key)}, this optimizer has {ours.get(key)}"
            )
    for saved, own in zip(theirs.get("param_names", ()), ours.get("param_names", ())):
        if saved != own:
            raise ValueError(f"group {i} holds {saved} where this optimizer has {own}")


def _check_parameter(identifier: int, saved: Mapping[str, Any] | None, own: Mapping[str, Any]) -> None:
    if saved is None:
        raise ValueError(f"has no state for parameter {identifier}")
    if set(saved) != set(own):
        raise ValueError(f"state of parameter {identifier} has {sorted(saved)}, expected {sorted(own)}")
    for key, value in saved.items():
        theirs = tuple(value.shape) if isinstance(value, Tensor) else ()
        ours = tuple(own[key].shape) if isinstance(own[key], Tensor) else ()
        if theirs != ours:
            raise ValueError(f"state {key} of parameter {identifier} has shape {theirs}, expected {ours}")


def restore_exactly(optimizer: torch.optim.Optimizer, state_dict: Mapping[str, Any]) -> None:
    """Undo torch's cast of floating state to the weight's dtype: moments of bf16 weights are fp32."""
    for identifier, parameter in _pairs(state_dict, optimizer):
        for key, value in state_dict["state"].get(identifier, {}).items():
            if key == "step":
                optimizer.state[parameter][key] = int(value)
            elif isinstance(value, Tensor):
                optimizer.state[parameter][key] = value.detach().to(parameter.device, copy=True)


def compact(state: Mapping[Tensor, Mapping[str, Any]]) -> defaultdict[Tensor, dict[str, Any]]:
    """Copy the state with each tensor in memory of its own: pickle would store a shared block once per view."""
    copy: defaultdict[Tensor, dict[str, Any]] = defaultdict(dict)
    for parameter, entries in state.items():
        copy[parameter] = {k: v.detach().clone() if isinstance(v, Tensor) else v for k, v in entries.items()}
    return copy


def _pairs(state_dict: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> list[tuple[Any, Tensor]]:
    saved = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
    own = chain.from_iterable(group["params"] for group in optimizer.param_groups)
    return list(zip(saved, own))


def kind_bytes(state: Mapping[str, Any]) -> dict[str, int]:
    """Return kind → bytes of a parameter's state tensors ("q.moment" counts as "moment")."""
    total: dict[str, int] = {}
    for key, value in state.items():
        if isinstance(value, Tensor):
            kind = key.rpartition(".")[2]
            total[kind] = total.get(kind, 0) + value.numel() * value.element_size()
    return total
