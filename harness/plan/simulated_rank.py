"""One rank of a run on meta tensors: its optimizer, laid out as the engine would lay it out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

import optimizers
from harness.config.schema import RunConfig
from harness.optimizer import shard_axes
from optimizers.layouts.axes import possible_axis
from optimizers.layouts.layout import Layout
from optimizers.layouts.simulated import SimulatedReplicas, SimulatedShards, simulated_slices
from optimizers.optimizer import Optimizer

ZERO_STAGES = {"zero1": 1, "zero2": 2, "zero3": 3}


@dataclass(frozen=True)
class PlannedRank:
    """A simulated rank.

    Attributes:
        network: the whole model on the meta device.
        optimizer: with the state that this rank would hold.
        shards: ranks that hold one replica of the weights together.
    """

    network: nn.Module
    optimizer: Optimizer
    shards: int


def simulate(config: RunConfig, network: nn.Module, rank: int) -> PlannedRank:
    """Lay the optimizer of one rank out over a model on the meta device.

    Args:
        config: checked; its optimizer is one of ours.
        network: whole model on the meta device; ranks may share it, as each sets its own gradients.
        rank: which one.
    """
    assert config.world_size is not None
    pairs = [(name, p) for name, p in network.named_parameters() if p.requires_grad]
    built = optimizers.build(
        config.optimizer.name,
        pairs,
        modules=network,
        layout="partitioned",
        lr=config.optimizer.lr,
        **config.optimizer.options,
    )
    assert isinstance(built, Optimizer)
    shards = shards_of(config)
    built.attach(_layout(config, built, network, rank, shards))
    if config.engine.name not in ZERO_STAGES:
        # As in a run, whose loop has looked at the gradients: the optimizer sends nothing to find out.
        built.found_inf = torch.zeros((), device="meta")
    return PlannedRank(network, built, shards)


def shards_of(config: RunConfig) -> int:
    """Ranks that hold one replica of the optimizer's state together."""
    assert config.world_size is not None
    name = config.engine.name
    if name == "hsdp":
        return config.world_size // (config.engine.replicas or 1)
    return config.world_size if name == "fsdp2" or name in ZERO_STAGES else 1


def _layout(config: RunConfig, built: Optimizer, network: nn.Module, rank: int, shards: int) -> Layout:
    assert config.world_size is not None
    name = config.engine.name
    if name in ZERO_STAGES:
        layout = simulated_slices(built.parameters_of_groups, ZERO_STAGES[name], rank, shards)
        for group, tensor in zip(built.param_groups, layout.tensors):
            group["params"] = [tensor]
        return layout
    if name in ("fsdp2", "hsdp"):
        axes = shard_axes(config, network, shards)
        by_id = {id(p): possible_axis(axes.get(n, 0), p.shape, shards) for n, p in network.named_parameters()}
        return SimulatedShards(by_id, rank % shards, shards)
    return SimulatedReplicas(config.engine.optimizer_work, rank, config.world_size)


def ranks_to_look_at(config: RunConfig) -> Sequence[int]:
    """Return all ranks of a small world, else a spread: both ends and two between.

    Where every rank does the same, one stands for all. Owners are dealt out from rank 0, so it has most.
    """
    assert config.world_size is not None
    world = config.world_size
    if shards_of(config) == 1 and config.engine.optimizer_work == "replicated":
        return [0]
    return range(world) if world <= 8 else sorted({0, 1, world // 2, world - 1})


def set_gradients(planned: PlannedRank) -> None:
    """Give the matrices gradients, so that a step moves what it would move; AdamW sends nothing."""
    matrices = {r.name for r in planned.optimizer.routes if r.rule != "adamw"}
    for name, p in planned.network.named_parameters():
        p.grad = torch.empty_like(p) if name in matrices else None
    for group in planned.optimizer.param_groups:
        if group["rule"] == "adamw":
            for tensor in group["params"]:
                tensor.grad = None
