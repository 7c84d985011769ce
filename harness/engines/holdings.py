"""What a process holds of a model: how the optimizer finds the parameters, and how many bytes they take."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch
from torch.distributed.tensor import DTensor

Layout = Literal["replicated", "sharded", "partitioned"]
"""How weights are held when the optimizer steps: whole on every process, as DTensors, or as DeepSpeed's flat slices."""


def tensor_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the elements on this process; memory shared by several tensors (tied weights, views) counts once."""
    seen: set[tuple[int, int]] = set()
    total = 0
    for tensor in tensors:
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        key = (local.untyped_storage().data_ptr(), int(local.storage_offset()))
        if key not in seen or key[0] == 0:
            seen.add(key)
            total += local.numel() * local.element_size()
    return total
