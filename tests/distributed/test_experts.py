"""Stacks of experts cut over ranks: whole experts in shards, intervals of them in slices."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

import optimizers
from tests.distributed.test_partitioned import cut
from tests.distributed.test_sharded import TOLERANCE

if TYPE_CHECKING:
    from tests.distributed.pool import RankPool

OPTIONS: dict[str, dict[str, Any]] = {
    "muon": {"orthogonalizer_dtype": "float32"},
    "sumo": {"rank": 4, "refresh_interval": 2},
}


class Experts(nn.Module):
    """Three experts, so that two ranks have two and one."""

    def __init__(self, form: str) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.is_transposed, self.is_concatenated = form != "rows", form != "alternating"
        both, down = ((3, 16, 10), (3, 10, 8)) if form == "rows" else ((3, 10, 16), (3, 8, 10))
        self.gate_up_proj = nn.Parameter(torch.randn(both, generator=generator))
        self.down_proj = nn.Parameter(torch.randn(down, generator=generator))


def slopes(experts: Experts, t: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(50 + t)
    return [torch.randn(p.shape, generator=generator) for p in experts.parameters()]


def trained(rank: int, preset: str, form: str, layout: str) -> list[torch.Tensor]:
    """Runs on each rank, or alone: weights at the end; this rank's pieces under ZeRO."""
    net = nn.ModuleDict({"experts": Experts(form)})
    experts = net["experts"]
    assert isinstance(experts, Experts)
    given = [slopes(experts, t) for t in range(4)]
    flats: list[Any] = []
    slots: dict[Any, Any] = {}

    def spread(tensor: torch.Tensor) -> Any:
        return tensor

    if layout == "fsdp2":
        import torch.distributed as dist
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor import Shard, distribute_tensor

        mesh = init_device_mesh("cpu", (dist.get_world_size(),))

        def spread(tensor: torch.Tensor) -> Any:
            return distribute_tensor(tensor, mesh, [Shard(0)])

        for name, p in list(experts.named_parameters()):
            setattr(experts, name, nn.Parameter(spread(p.detach())))
    is_zero = layout.startswith("zero")
    more: dict[str, Any] = {"layout": "partitioned"} if is_zero else {}
    optimizer: Any = optimizers.build(
        preset, net.named_parameters(), modules=net, lr=0.1, **OPTIONS[preset], **more
    )
    parameters: list[Any] = list(experts.parameters())
    if is_zero:
        import torch.distributed as dist

        from optimizers.layouts import partitioned
        from optimizers.layouts.communicator import Communicator

        ranks = Communicator(dist.group.WORLD)
        tensor, slots = cut(parameters, layout, rank, ranks.size)
        flats = [partitioned.Flat(tensor, 0, slots)]
        optimizer.param_groups[0]["params"] = [tensor]
        optimizer.attach(partitioned.PartitionedLayout(flats, optimizer.parameters_of_groups, [ranks]))
    for gradients in given:
        if is_zero:
            pieces = [g.reshape(-1)[slice(*slot.pieces[rank])] for g, slot in zip(gradients, slots.values())]
            flats[0].tensor.grad = torch.cat(pieces)
        else:
            for p, gradient in zip(parameters, gradients):
                p.grad = spread(gradient)
        optimizer.step()
    if is_zero:
        found = []
        for slot in slots.values():
            lo, hi = slot.pieces[rank]
            found.append(flats[0].tensor[slot.at : slot.at + hi - lo].detach().clone())
        return found
    return [p.detach().full_tensor() if layout == "fsdp2" else p.detach() for p in parameters]


def assert_same(found: list[torch.Tensor], expected: list[torch.Tensor], form: str) -> None:
    for mine, theirs, start in zip(found, expected, Experts(form).parameters()):
        change = float((theirs - start.detach()).norm())
        assert float((mine - theirs).norm()) < TOLERANCE * change


@pytest.mark.parametrize("form", ["rows", "columns", "alternating"])
@pytest.mark.parametrize("preset", OPTIONS)
def test_shards_hold_whole_experts(two_ranks: RankPool, preset: str, form: str) -> None:
    expected = trained(0, preset, form, "alone")
    for found in two_ranks.run(trained, preset, form, "fsdp2"):
        assert_same(found, expected, form)


@pytest.mark.parametrize("layout", ["zero1", "zero3"])
@pytest.mark.parametrize("preset", OPTIONS)
def test_slices_hold_parts_of_them(two_ranks: RankPool, preset: str, layout: str) -> None:
    expected = trained(0, preset, "rows", "alone")
    results = two_ranks.run(trained, preset, "rows", layout)
    whole = [torch.cat([found[i] for found in results]).view(p.shape) for i, p in enumerate(expected)]
    assert_same(whole, expected, "rows")


def test_slices_of_columns_are_refused(two_ranks: RankPool) -> None:
    with pytest.raises(AssertionError, match=r"experts.gate_up_proj\[0.gate\]: .*use ddp, fsdp2 or zero0"):
        two_ranks.run(trained, "muon", "columns", "zero1")
