"""State saved in one layout and world size goes on in another."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

import optimizers
from optimizers import named_state
from tests.distributed.test_partitioned import cut
from tests.distributed.test_sharded import PRESETS, TOLERANCE, gradients

if TYPE_CHECKING:
    from tests.distributed.pool import RankPool

SHAPES = [(26, 14), (14, 26), (26, 14), (15, 15), (7,)]
OPTIONS: dict[str, Any] = {"rank": 5, "refresh_interval": 3}


def run(
    rank: int,
    preset: str,
    kind: str,
    first: int,
    last: int,
    weights: list[torch.Tensor],
    saved: Any,
    extra: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Steps `first` to `last` in a layout, from weights and a state by name; what they are then, in parts."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    from optimizers.layouts.communicator import Communicator
    from optimizers.layouts.partitioned import Flat, PartitionedLayout

    options = {**PRESETS[preset], **(OPTIONS if "rank" in PRESETS[preset] else {}), **(extra or {})}
    world = dist.get_world_size() if dist.is_initialized() else 1
    mesh = init_device_mesh("cpu", (world,)) if kind == "fsdp2" else None

    def spread(tensor: torch.Tensor) -> Any:
        return distribute_tensor(tensor, mesh, [Shard(0)]) if mesh is not None else tensor.clone()

    named: list[Any] = [(f"layers.{i}.w", nn.Parameter(spread(w))) for i, w in enumerate(weights)]
    more: dict[str, Any] = {}
    if kind == "split":
        more = {"process_group": dist.group.WORLD, "work": "split"}
    if kind.startswith("zero"):
        more = {"layout": "partitioned"}
    optimizer: Any = optimizers.build(preset, named, lr=0.02, **options, **more)
    places = {id(p): i for i, (_, p) in enumerate(named)}
    flats: list[Flat] = []
    if kind.startswith("zero"):
        ranks = Communicator(dist.group.WORLD)
        for index, parameters in enumerate(optimizer.parameters_of_groups):
            tensor, slots = cut(parameters, kind, rank, world)
            flats.append(Flat(tensor, index, slots))
            optimizer.param_groups[index]["params"] = [tensor]
        layout = PartitionedLayout(flats, optimizer.parameters_of_groups, [ranks] * len(flats))
        optimizer.attach(layout)
    if saved is not None:
        steps, tensors = saved
        named_state.load(optimizer, steps, lambda part: part.of(tensors[part.name, part.kind]))
    for step in range(first, last):
        slopes = gradients(SHAPES, step)
        for _, p in named:
            p.grad = None if flats else spread(slopes[places[id(p)]])
        for flat in flats:
            flat.tensor.grad = torch.cat(
                [
                    slopes[places[id(p)]].reshape(-1)[slice(*slot.pieces[rank])]
                    for p, slot in flat.slots.items()
                ]
            )
        optimizer.step()
    parts = [part._replace(tensor=part.tensor.clone()) for part in named_state.pieces(optimizer)]
    held: dict[int, torch.Tensor] = {}
    for flat in flats:
        for p, slot in flat.slots.items():
            lo, hi = slot.pieces[rank]
            held[places[id(p)]] = flat.tensor[slot.at : slot.at + hi - lo].detach().clone()
    if not flats:
        gathered = [p.detach().full_tensor() if mesh is not None else p.detach() for _, p in named]
        held = dict(enumerate(g.reshape(-1).clone() for g in gathered))
    return {"parts": parts, "steps": optimizer.steps_by_name(), "weights": held, "is_cut": bool(flats)}


def joined(results: list[dict[str, Any]]) -> tuple[list[torch.Tensor], Any]:
    weights = []
    for i, shape in enumerate(SHAPES):
        parts = [r["weights"][i] for r in results] if results[0]["is_cut"] else [results[0]["weights"][i]]
        weights.append(torch.cat(parts).view(shape))
    parts = [part for result in results for part in result["parts"]]
    return weights, (results[0]["steps"], named_state.assemble(parts))


def start() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


MOVES = [("zero1", "fsdp2"), ("fsdp2", "zero3"), ("split", "zero1"), ("zero3", "single")]
QUICK: dict[str, tuple[str, str]] = dict(zip(("galore", "muon", "adamw"), MOVES))
"""SUMO moves every way; each of the others one way, and the rest of its ways are slow."""


@pytest.mark.parametrize(
    ("preset", "before", "after"),
    [
        pytest.param(preset, *move, marks=[] if QUICK.get(preset, move) == move else pytest.mark.slow)
        for preset in ("sumo", *QUICK)
        for move in MOVES
    ],
)
def test_a_state_goes_on_elsewhere(
    two_ranks: RankPool, four_ranks: RankPool, preset: str, before: str, after: str
) -> None:
    """Four steps on two ranks, four more on four (or one): as one process that was never interrupted. The
    first refresh after the change reads the basis and the moment that came along."""
    weights, saved = joined(two_ranks.run(run, preset, before, 0, 4, start(), None))
    if after == "single":
        results = [run(0, preset, after, 4, 8, weights, saved)]
    else:
        results = four_ranks.run(run, preset, after, 4, 8, weights, saved)
    found, state = joined(results)
    expected, whole = joined([run(0, preset, "single", 0, 8, start(), None)])
    for f, e, s in zip(found, expected, start()):
        assert float((f - e).norm() / (e - s).norm()) < TOLERANCE
    assert state[0] == whole[0]
    assert state[1].keys() == whole[1].keys()


def test_control_without_its_state_it_goes_elsewhere(two_ranks: RankPool) -> None:
    weights, saved = joined(two_ranks.run(run, "sumo", "zero1", 0, 4, start(), None))
    steps = saved[0]
    empty = {key: torch.zeros_like(value) for key, value in saved[1].items()}
    found, _ = joined(two_ranks.run(run, "sumo", "fsdp2", 4, 8, weights, (steps, empty)))
    expected, _ = joined([run(0, "sumo", "single", 0, 8, start(), None)])
    assert max(float((f - e).norm() / (e - s).norm()) for f, e, s in zip(found, expected, start())) > 1e-2


def test_a_piece_that_is_missing_is_named() -> None:
    part = named_state.StatePiece("w", "moment", (4, 2), 0, 0, torch.ones(2, 2), True)
    with pytest.raises(ValueError, match="w: 4 of 8 elements of moment were written"):
        named_state.assemble([part])


def test_another_shape_is_refused() -> None:
    part = named_state.StatePiece("w", "moment", (4, 2), 0, 0, torch.ones(2, 2), True)
    with pytest.raises(ValueError, match=r"w: moment has shape \(3, 2\), expected \(4, 2\)"):
        part.of(torch.zeros(3, 2))
