"""State of a foreign torch optimizer by parameter name: any tree of tensors and numbers.

A tensor as large as its parameter (or, under ZeRO, as the flat slice) is kept as an interval of a whole tensor, so
it goes to other engines and numbers of processes. Other tensors are kept whole where every process holds whole
parameters, and for each process by itself on shards.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from harness.checkpoint.files import Saved
from harness.checkpoint.store import DamagedCheckpoint
from harness.devices import uses_cuda
from optimizers.layouts.layout import Layout
from optimizers.layouts.partitioned import PartitionedLayout
from optimizers.named_state import FLAT, StatePiece, parameter_shape

_PREFIX = "plugin."
_GROUP_VALUES = (bool, int, float, str)


class ForeignState:
    """State of a foreign torch optimizer by parameter name.

    Args:
        optimizer: any torch optimizer.
        named: its parameters by name.
        layout: how the processes hold them.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, named: Mapping[str, Tensor], layout: Layout) -> None:
        self._optimizer, self._named, self._layout = optimizer, named, layout

    def pieces(self) -> Iterator[StatePiece]:
        """Yield this process' part of every state tensor: views."""
        for name, parameter in self._named.items():
            for path, tensor in _tensors(_state_of(self._optimizer, parameter, self._layout)):
                yield _piece(name, path, tensor, parameter, self._layout)

    def facts(self) -> dict[str, Any]:
        """Return the trees around the tensors, and the numbers in the groups, which some optimizers keep state in.

        Raises:
            TypeError: the state holds something else than tensors, numbers, text, lists and dicts of these.
        """
        trees = {
            name: _tree(_state_of(self._optimizer, parameter, self._layout), "")
            for name, parameter in self._named.items()
        }
        groups = [
            {
                key: value
                for key, value in group.items()
                if isinstance(value, _GROUP_VALUES) and key != "params"
            }
            for group in self._optimizer.param_groups
        ]
        return {"trees": trees, "groups": groups}

    def load(self, facts: Mapping[str, Any], saved: Saved) -> None:
        """Build the state anew from a checkpoint.

        Args:
            facts: what `facts` returned when it was written.
            saved: the checkpoint.

        Raises:
            DamagedCheckpoint: a tensor is missing, or belongs to a process of another number of processes.
        """
        optimizer, layout = self._optimizer, self._layout
        for group, values in zip(optimizer.param_groups, facts["groups"]):
            group.update(values)
        for name, parameter in self._named.items():
            tree = facts["trees"].get(name)
            if tree is None:
                raise DamagedCheckpoint(f"{saved.folder.name}: optimizer state of {name} is missing")

            def read(path: str, name: str = name, parameter: Tensor = parameter) -> Tensor:
                return _read(optimizer, name, path, parameter, layout, saved)

            if isinstance(layout, PartitionedLayout):
                # Several parameters fill the tensors of one flat slice.
                optimizer.state[layout.flat_of(parameter)].update(_built(tree, read))
            elif tree["dict"]:
                optimizer.state[parameter] = _built(tree, read)


def _state_of(optimizer: torch.optim.Optimizer, parameter: Tensor, layout: Layout) -> Mapping[str, Any]:
    key = layout.flat_of(parameter) if isinstance(layout, PartitionedLayout) else parameter
    return optimizer.state.get(key, {})


def _piece(name: str, path: str, tensor: Tensor, parameter: Tensor, layout: Layout) -> StatePiece:
    shape, kind = tuple(parameter_shape(parameter)), _PREFIX + path
    dim, start = layout.interval(parameter)
    if isinstance(layout, PartitionedLayout):
        return StatePiece(name, kind, shape, FLAT, start, layout.part_of(parameter, tensor), True)
    if tuple(tensor.shape) == shape:
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        return StatePiece(name, kind, shape, dim, start, local, layout.is_first_replica)
    if dim is None:
        return StatePiece(name, kind, tuple(tensor.shape), None, 0, tensor, layout.is_first_replica)
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    own = f"{kind}@{torch.distributed.get_rank()}of{torch.distributed.get_world_size()}"
    return StatePiece(name, own, tuple(local.shape), None, 0, local, True)


def _read(
    optimizer: torch.optim.Optimizer, name: str, path: str, parameter: Tensor, layout: Layout, saved: Saved
) -> Tensor:
    """Return a tensor of the state, on the parameter's device and cut as the parameter is."""
    shape, kind = tuple(parameter_shape(parameter)), _PREFIX + path
    dim, start = layout.interval(parameter)
    device = layout.weight(parameter).device
    if isinstance(layout, PartitionedLayout):
        flat = layout.flat_of(parameter)
        known = optimizer.state[flat].get(path)
        whole = (
            known
            if known is not None
            else torch.zeros(flat.numel(), dtype=saved.dtype(name, kind), device=device)
        )
        part = layout.part_of(parameter, whole)
        part.copy_(saved.read(StatePiece(name, kind, shape, FLAT, start, part, True)))
        return whole
    if (name, kind) in saved and saved.shape(name, kind) == shape:
        if isinstance(parameter, DTensor):
            like = torch.empty_like(parameter, dtype=saved.dtype(name, kind), requires_grad=False)
            assert isinstance(like, DTensor)
            local = like.to_local()
            local.copy_(saved.read(StatePiece(name, kind, shape, dim, start, local, True)))
            return like
        return saved.whole(name, kind).to(device, copy=True)
    if dim is None and (name, kind) in saved:
        return saved.whole(name, kind).to(device, copy=True)
    own = (
        f"{kind}@{torch.distributed.get_rank()}of{torch.distributed.get_world_size()}"
        if dim is not None
        else kind
    )
    if (name, own) not in saved:
        raise DamagedCheckpoint(
            f"{saved.folder.name}: {path} of {name} was kept for other processes than these; "
            "this plug-in's state can only be loaded with the same engine and world_size"
        )
    return saved.whole(name, own).to(device, copy=True)


def _tensors(tree: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield (path, tensor) of every tensor that is not a mere number."""
    if isinstance(tree, Tensor):
        if tree.ndim:
            yield path, tree
    elif isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from _tensors(value, _joined(path, key))
    elif isinstance(tree, list | tuple):
        for i, value in enumerate(tree):
            yield from _tensors(value, _joined(path, i))


def _tree(value: Any, path: str) -> Any:
    if isinstance(value, Tensor):
        if value.ndim:
            return {"tensor": path}
        return {
            "number": value.item(),
            "dtype": str(value.dtype).removeprefix("torch."),
            "device": value.device.type,
        }
    if value is None or isinstance(value, bool | int | float | str):
        return {"value": value}
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {"dict": {key: _tree(inner, _joined(path, key)) for key, inner in value.items()}}
    if isinstance(value, list | tuple):
        kind = "list" if isinstance(value, list) else "tuple"
        return {kind: [_tree(inner, _joined(path, i)) for i, inner in enumerate(value)]}
    raise TypeError(f"optimizer state {path} is a {type(value).__name__}, which no checkpoint can hold")


def _built(tree: Mapping[str, Any], read: Any) -> Any:
    (kind, content), *_ = tree.items()
    if kind == "tensor":
        return read(content)
    if kind == "number":
        device = tree["device"] if uses_cuda() else "cpu"
        return torch.tensor(content, dtype=getattr(torch, tree["dtype"]), device=device)
    if kind == "dict":
        return {key: _built(inner, read) for key, inner in content.items()}
    if kind == "list":
        return [_built(inner, read) for inner in content]
    if kind == "tuple":
        return tuple(_built(inner, read) for inner in content)
    return content


def _joined(path: str, key: object) -> str:
    return f"{path}.{key}" if path else str(key)
