"""Give a model on the meta device its memory and its initial numbers, whole or as this process' shards."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from harness.protocols import WeightSource


def fill_whole(
    model: nn.Module, weights: WeightSource, device: torch.device, dtype: torch.dtype | None = None
) -> None:
    """Give every parameter and buffer of a model memory on a device, and its initial numbers.

    Args:
        model: on the meta device.
        weights: its numbers.
        device: of this process.
        dtype: of the floating-point parameters; None: as the model has them.
    """
    tensors = dict(model.named_parameters())
    for name, parameter in tensors.items():
        kind = dtype if dtype is not None and parameter.is_floating_point() else parameter.dtype
        memory = torch.empty_like(parameter, device=device, dtype=kind)
        tensors[name] = nn.Parameter(memory, requires_grad=parameter.requires_grad)
    replace_parameters(model, tensors)
    fill_buffers(model, device)
    fill(model, weights)


def fill_shards(model: nn.Module, weights: WeightSource, device: torch.device) -> None:
    """Give the DTensors of a model memory for this process' shards, and their part of the initial numbers.

    Args:
        model: after `fully_shard`, on the meta device.
        weights: its numbers.
        device: of this process.
    """
    model.to_empty(device=device)
    fill(model, weights)


@torch.no_grad()
def fill(model: nn.Module, weights: WeightSource) -> None:
    """Copy this process' part of the initial numbers into parameters and buffers that have memory."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}

    def put(name: str, value: Tensor) -> None:
        target = tensors[name]
        if isinstance(target, DTensor):
            sizes, offsets = compute_local_shape_and_global_offset(
                target.shape, target.device_mesh, target.placements
            )
            for axis, (size, offset) in enumerate(zip(sizes, offsets)):
                value = value.narrow(axis, offset if size else 0, size)
            target = target.to_local()
        target.copy_(value)

    weights.deliver(put)


def replace_parameters(model: nn.Module, by_name: dict[str, nn.Parameter]) -> None:
    """Replace parameters in all modules that hold them, so that tied ones stay tied."""
    holders: dict[int, list[tuple[nn.Module, str]]] = defaultdict(list)
    for module in model.modules():
        for key, parameter in module._parameters.items():
            holders[id(parameter)].append((module, key))
    for name, old in list(model.named_parameters()):
        for module, key in holders[id(old)]:
            module._parameters[key] = by_name[name]


def fill_buffers(model: nn.Module, device: torch.device) -> None:
    """Give the buffers of a model memory on a device."""
    for module in model.modules():
        for key, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[key] = torch.empty_like(buffer, device=device)
