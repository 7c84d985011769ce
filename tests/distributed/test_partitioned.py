"""Flat slices on real gloo ranks, cut as ZeRO-1 and ZeRO-3 cut them: boundaries in the middle of rows, ranks
with nothing, rows over three ranks. (DeepSpeed itself: test_engines.py.)"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

import optimizers
from tests.distributed.test_sharded import PRESETS, STEPS, TOLERANCE, alone, gradients, weights, worst

if TYPE_CHECKING:
    from tests.distributed.pool import RankPool

# 13·7 elements over four ranks break rows; (2, 60) over four ranks puts a row on three of them.
SHAPES = [(13, 7), (2, 60), (24, 16), (16, 24), (24, 16), (9, 9), (7,), (1, 5)]
SMALL = {"rank": None, "refresh_interval": 3}


def cut(parameters: list[torch.Tensor], kind: str, rank: int, world: int) -> tuple[torch.Tensor, Any]:
    """This rank's flat tensor and the slots of the parameters in it."""
    from optimizers.layouts.partitioned import Slot

    slots, parts, at = {}, [], 0
    total = sum(p.numel() for p in parameters)
    size, offset = -(-total // world), 0
    for p in parameters:
        n = p.numel()
        if kind == "zero1":
            edges = [min(max(q * size - offset, 0), n) for q in range(world + 1)]
            offset += n
        else:
            step = -(-n // world)
            edges = [min(q * step, n) for q in range(world + 1)]
        pieces = tuple(pairwise(edges))
        lo, hi = pieces[rank]
        parts.append(p.detach().reshape(-1)[lo:hi])
        slots[p] = Slot(pieces, at)
        at += hi - lo
    return torch.cat(parts), slots


def partitioned(
    rank: int, preset: str, kind: str, more: dict[str, Any], blind: bool = False
) -> dict[str, Any]:
    """Runs on each rank. With `blind` broken rows are not completed."""
    import torch.distributed as dist

    from optimizers.layouts import partitioned as module
    from optimizers.layouts.communicator import Communicator

    ranks = Communicator(dist.group.WORLD)
    named = [(f"layers.{i}.w", nn.Parameter(w)) for i, w in enumerate(weights(SHAPES))]
    optimizer: Any = optimizers.build(
        preset, named, lr=0.02, layout="partitioned", **{**PRESETS[preset], **more}
    )
    optimizer.step()  # DeepSpeed may call it before the layout is known
    flats = []
    for index, parameters in enumerate(optimizer.parameters_of_groups):
        tensor, slots = cut(parameters, kind, rank, ranks.size)
        flats.append(module.Flat(tensor, index, slots))
        optimizer.param_groups[index]["params"] = [tensor]
    optimizer.attach(module.PartitionedLayout(flats, optimizer.parameters_of_groups, [ranks] * len(flats)))
    places = {id(p): i for i, (_, p) in enumerate(named)}
    original, gradient = module.RowBucket.begin, module.FlatSliceView.gradient
    if blind:
        module.RowBucket.begin = lambda self: None  # type: ignore[method-assign]
        module.FlatSliceView.gradient = _torn(module.FlatSliceView.gradient)  # type: ignore[method-assign]
    try:
        for step in range(STEPS):
            slopes = gradients(SHAPES, step)
            for flat in flats:
                parts = []
                for p, slot in flat.slots.items():
                    lo, hi = slot.pieces[rank]
                    parts.append(slopes[places[id(p)]].reshape(-1)[lo:hi])
                flat.tensor.grad = torch.cat(parts)
            everything = optimizer.param_groups
            for group in everything:  # one at a time, as DeepSpeed does
                optimizer.param_groups = [group]
                optimizer.step()
            optimizer.param_groups = everything
    finally:
        module.RowBucket.begin = original  # type: ignore[method-assign]
        module.FlatSliceView.gradient = gradient  # type: ignore[method-assign]
    pieces = {}
    for flat in flats:
        for p, slot in flat.slots.items():
            lo, hi = slot.pieces[rank]
            pieces[places[id(p)]] = flat.tensor[slot.at : slot.at + hi - lo].detach().clone()
    return {"pieces": pieces, "state": optimizer.state_bytes(), "sent": optimizer.bytes_sent()}


def _torn(method: Any) -> Any:
    def gradient(self: Any, parameter: Any, block: Any) -> Any:
        found = self.shape[0] * self.columns - (
            min(self.piece[1], self.row_range[1] * self.columns) - self.row_range[0] * self.columns
        )
        self.tail = torch.zeros(max(0, found))
        return method(self, parameter, block)

    return gradient


def whole(results: list[dict[str, Any]]) -> list[torch.Tensor]:
    return [
        torch.cat([result["pieces"][i] for result in results]).view(shape) for i, shape in enumerate(SHAPES)
    ]


BOTH = ("sumo", "galore", "muon", "adamw")
"""Presets that both ways to cut are tried on every time: one per family. Of the others the second one is slow."""


@pytest.mark.parametrize(
    ("preset", "kind"),
    [
        pytest.param(preset, kind, marks=[] if kind == "zero3" or preset in BOTH else pytest.mark.slow)
        for preset in PRESETS
        for kind in ("zero1", "zero3")
    ],
)
def test_two_ranks_equal_one_process(two_ranks: RankPool, preset: str, kind: str) -> None:
    more = SMALL if "rank" in PRESETS[preset] else {}
    found = whole(two_ranks.run(partitioned, preset, kind, more))
    assert worst(found, alone(preset, SHAPES, **more), SHAPES) < TOLERANCE


@pytest.mark.parametrize(
    ("preset", "kind"),
    [
        pytest.param(preset, kind, marks=[] if kind == "zero1" or preset == "sumo" else pytest.mark.slow)
        for preset in BOTH
        for kind in ("zero1", "zero3")
    ],
)
def test_four_ranks(four_ranks: RankPool, preset: str, kind: str) -> None:
    more = SMALL if "rank" in PRESETS[preset] else {}
    found = whole(four_ranks.run(partitioned, preset, kind, more))
    assert worst(found, alone(preset, SHAPES, **more), SHAPES) < TOLERANCE


def test_control_a_broken_row_that_is_not_completed_is_seen(two_ranks: RankPool) -> None:
    found = whole(two_ranks.run(partitioned, "sumo", "zero3", SMALL, True))
    assert worst(found, alone("sumo", SHAPES, **SMALL), SHAPES) > 1e-3


def test_a_state_dict_is_refused_by_name() -> None:
    named = [("layers.0.w", nn.Parameter(torch.zeros(8, 6)))]
    optimizer = optimizers.build("muon", named, lr=0.1, layout="partitioned")
    with pytest.raises(RuntimeError, match=r"state_dict: .* use optimizers\.named_state"):
        optimizer.state_dict()
    with pytest.raises(RuntimeError, match=r"load_state_dict: .* use optimizers\.named_state"):
        optimizer.load_state_dict({})


@pytest.mark.parametrize(("key", "value"), [("layout", "sharded"), ("work", "shared")])
def test_unknown_words_are_refused(key: str, value: str) -> None:
    named = [("layers.0.w", nn.Parameter(torch.zeros(8, 6)))]
    options: Any = {key: value}
    with pytest.raises(optimizers.OptionError, match=key):
        optimizers.build("muon", named, **options)
