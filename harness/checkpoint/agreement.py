"""What the processes of a run tell each other about checkpoints: small Python values, by torch.distributed."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist


def from_first(value: Any) -> Any:
    """Return rank 0's value on all processes (a collective)."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def from_all(value: str) -> list[str]:
    """Return the values of all processes, by rank (a collective)."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
