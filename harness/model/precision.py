"""Weights in another dtype than the numbers that a model computes from positions and counts."""

from __future__ import annotations

from typing import Any

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


def may_mix_dtypes(model: nn.Module) -> bool:
    """Return True if the model has fp32 buffers that its code might multiply with weights of another dtype.

    Rotary embeddings compute in fp32 and cast their result, so their frequencies are not among them.
    """
    buffers = [name for name, buffer in model.named_buffers() if buffer.is_floating_point() and buffer.ndim]
    return not all(name.endswith("inv_freq") for name in buffers)


@torch.no_grad()
def mixed_dtypes(model: Any) -> str | None:
    """Return the error of a forward pass that can't multiply weights with the model's fp32 buffers, or None."""
    was_training = model.training
    try:
        model.eval()(input_ids=torch.zeros(1, 2, dtype=torch.long))
    except RuntimeError as error:
        if "dtype" not in str(error) and "scalar type" not in str(error):
            raise
        return str(error).splitlines()[0]
    finally:
        model.train(was_training)
    return None
