"""Weights in another dtype than the numbers that a model computes from positions and counts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@torch.no_grad()
def cast_parameters(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast the floating-point parameters of a model in place; buffers keep their dtype.

    `Module.to(dtype)` would also round rotary frequencies (0.45 rad off at position 1023 in bf16), ALiBi slopes and
    the biases that balance routers.
    """
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)


@contextmanager
def exact_buffers(model: nn.Module) -> Iterator[None]:
    """Undo what the enclosed code does to the dtype and the values of the model's floating-point buffers."""
    kept = {
        name: buffer.detach().clone() for name, buffer in model.named_buffers() if buffer.is_floating_point()
    }
    yield
    for name, buffer in model.named_buffers():
        if name in kept:
            buffer.data = kept[name].to(buffer.device)
