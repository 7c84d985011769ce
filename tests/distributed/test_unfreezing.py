"""A parameter that is unfrozen after the optimizer was built, on layouts that divide the state."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

import optimizers
from tests.distributed.test_sharded import PRESETS, TOLERANCE, gradients, weights, worst

if TYPE_CHECKING:
    from tests.distributed.pool import RankPool

SHAPES: list[tuple[int, ...]] = [(24, 16), (24, 16), (16, 24), (24, 16), (16,), (12,)]
LATE = (0, 2, 5)
STARTS = 3
STEPS = 6


def trained(rank: int, preset: str, layout: str) -> list[torch.Tensor]:
    """Runs on each rank, or alone: weights at the end."""

    def spread(tensor: torch.Tensor) -> Any:
        return tensor

    more: dict[str, Any] = {**PRESETS[preset]}
    if layout != "alone":
        import torch.distributed as dist
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor import Shard, distribute_tensor

        if layout == "fsdp2":
            mesh = init_device_mesh("cpu", (dist.get_world_size(),))

            def spread(tensor: torch.Tensor) -> Any:
                return distribute_tensor(tensor, mesh, [Shard(0)])
        else:
            more |= {"process_group": dist.group.WORLD, "work": layout}
    named: list[Any] = [
        (f"layers.{i}.w", nn.Parameter(spread(w), requires_grad=i not in LATE))
        for i, w in enumerate(weights(SHAPES))
    ]
    optimizer: Any = optimizers.build(preset, named, lr=0.02, **more)
    for step in range(STEPS):
        if step == STARTS:
            for i in LATE:
                named[i][1].requires_grad_()
        for (_, p), gradient in zip(named, gradients(SHAPES, step)):
            p.grad = spread(gradient) if p.requires_grad else None
        optimizer.step()
    return [p.detach().full_tensor() if layout == "fsdp2" else p.detach() for _, p in named]


@pytest.mark.parametrize("layout", ["fsdp2", "replicated", "split"])
@pytest.mark.parametrize("preset", ["sumo", "muon", "adamw"])
def test_it_starts_on_every_layout(two_ranks: RankPool, preset: str, layout: str) -> None:
    expected = trained(0, preset, "alone")
    for found in two_ranks.run(trained, preset, layout):
        assert worst(found, expected, SHAPES) < TOLERANCE
