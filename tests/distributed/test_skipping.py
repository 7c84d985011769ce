"""A NaN that lies on one rank: all ranks leave the same matrix out of the step, and go on together."""

from __future__ import annotations

import math
import warnings
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

import optimizers
from tests.distributed.test_partitioned import cut
from tests.distributed.test_sharded import PRESETS, TOLERANCE, gradients, weights, worst

if TYPE_CHECKING:
    from tests.distributed.pool import RankPool

# Broken rows under ZeRO, an owner for 16×24, a vector under AdamW.
SHAPES: list[tuple[int, ...]] = [(13, 7), (24, 16), (16, 24), (24, 16), (16,), (6, 5)]
STEPS = 6
# Step → parameter whose last element (on the last rank) is NaN then; 0 and 3 are refreshes.
SPOILED = {0: 1, 2: 0, 3: 2, 4: 4}
LAYOUTS = ("fsdp2", "ddp", "split", "zero1", "zero3")


def spoiled_gradients(step: int, spoil: bool) -> list[torch.Tensor]:
    made = gradients(SHAPES, step)
    if spoil and step in SPOILED:
        made[SPOILED[step]].view(-1)[-1] = math.nan
    return made


def alone(preset: str, spoil: bool) -> tuple[list[torch.Tensor], dict[str, int]]:
    """What one process makes of it."""
    named = [(f"layers.{i}.w", nn.Parameter(w)) for i, w in enumerate(weights(SHAPES))]
    optimizer: Any = optimizers.build(preset, named, lr=0.02, weight_decay=0.1, **options(preset))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for step in range(STEPS):
            for (_, p), gradient in zip(named, spoiled_gradients(step, spoil)):
                p.grad = gradient
            optimizer.step()
    return [p.detach() for _, p in named], optimizer.steps_by_name()


def options(preset: str) -> dict[str, Any]:
    return {**PRESETS[preset], **({"rank": 4} if "rank" in PRESETS[preset] else {})}


def on_a_rank(rank: int, preset: str, layout: str, blind: bool = False) -> dict[str, Any]:
    """Runs on each rank: whole weights (flat pieces under ZeRO), and what the optimizer counted."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    from optimizers import skipping
    from optimizers.layouts import partitioned
    from optimizers.layouts.communicator import Communicator

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    is_zero = layout.startswith("zero")

    def spread(tensor: torch.Tensor) -> Any:
        return distribute_tensor(tensor, mesh, [Shard(0)]) if layout == "fsdp2" else tensor

    named: list[Any] = [(f"layers.{i}.w", nn.Parameter(spread(w))) for i, w in enumerate(weights(SHAPES))]
    more: dict[str, Any] = {"layout": "partitioned"} if is_zero else {}
    if layout in ("ddp", "split"):
        more = {
            "process_group": dist.group.WORLD,
            "work": "split" if layout == "split" else "replicated",
        }
    optimizer: Any = optimizers.build(preset, named, lr=0.02, weight_decay=0.1, **options(preset), **more)
    flats: list[Any] = []
    places = {id(p): i for i, (_, p) in enumerate(named)}
    if is_zero:
        ranks = Communicator(dist.group.WORLD)
        for index, parameters in enumerate(optimizer.parameters_of_groups):
            tensor, slots = cut(parameters, layout, rank, ranks.size)
            flats.append(partitioned.Flat(tensor, index, slots))
            optimizer.param_groups[index]["params"] = [tensor]
        places_ = optimizer.parameters_of_groups
        optimizer.attach(partitioned.PartitionedLayout(flats, places_, [ranks] * len(flats)))
    may_look = skipping.host_may_look
    if blind:
        skipping.host_may_look = lambda device: False
    caught = []
    try:
        for step in range(STEPS):
            slopes = spoiled_gradients(step, True)
            if is_zero:
                for flat in flats:
                    parts = []
                    for p, slot in flat.slots.items():
                        lo, hi = slot.pieces[rank]
                        parts.append(slopes[places[id(p)]].reshape(-1)[lo:hi])
                    flat.tensor.grad = torch.cat(parts)
            else:
                for (_, p), gradient in zip(named, slopes):
                    p.grad = spread(gradient)
            with warnings.catch_warnings(record=True) as found:
                warnings.simplefilter("always")
                optimizer.step()
            caught += [str(w.message) for w in found if issubclass(w.category, RuntimeWarning)]
    finally:
        skipping.host_may_look = may_look
    pieces: dict[int, torch.Tensor] = {}
    if is_zero:
        for flat in flats:
            for p, slot in flat.slots.items():
                lo, hi = slot.pieces[rank]
                pieces[places[id(p)]] = flat.tensor[slot.at : slot.at + hi - lo].detach().clone()
    else:
        for i, (_, p) in enumerate(named):
            pieces[i] = p.detach().full_tensor() if layout == "fsdp2" else p.detach()
    return {
        "pieces": pieces,
        "steps": optimizer.steps_by_name(),
        "skipped": optimizer.skipped_steps,
        "warnings": caught,
        "calls": optimizer.collective_calls(),
    }


def whole(results: list[dict[str, Any]], layout: str) -> list[torch.Tensor]:
    if not layout.startswith("zero"):
        return [results[0]["pieces"][i] for i in range(len(SHAPES))]
    return [
        torch.cat([result["pieces"][i] for result in results]).view(shape) for i, shape in enumerate(SHAPES)
    ]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("preset", ["sumo", "galore", "muon", "adamw"])
def test_two_ranks_skip_what_one_process_skips(two_ranks: RankPool, preset: str, layout: str) -> None:
    results = two_ranks.run(on_a_rank, preset, layout)
    expected, steps = alone(preset, True)
    assert worst(whole(results, layout), expected, SHAPES) < TOLERANCE
    assert worst(whole(results, layout), alone(preset, False)[0], SHAPES) > 100 * TOLERANCE
    for result in results:
        assert result["steps"] == steps
        assert result["skipped"] == {f"layers.{i}.w": 1 for i in SPOILED.values()}
        assert len(result["warnings"]) == 1
        assert result["calls"] == results[0]["calls"]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("preset", ["sumo", "muon"])
def test_so_they_do_where_the_host_may_not_look(two_ranks: RankPool, preset: str, layout: str) -> None:
    results = two_ranks.run(on_a_rank, preset, layout, True)
    for result in results:
        assert result["skipped"] == {f"layers.{i}.w": 1 for i in SPOILED.values()}
        assert result["steps"] == results[0]["steps"]
        assert len(result["warnings"]) == 1
    for found, start in zip(whole(results, layout), weights(SHAPES)):
        assert bool(found.isfinite().all())
        assert not torch.equal(found, start)
