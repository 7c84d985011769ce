"""Bytes that a rank sends: the optimizer's by running its step on meta tensors, the engine's by formula."""

from __future__ import annotations

from harness.config.schema import RunConfig
from harness.model import decoder_layers
from harness.plan.rank import ZERO_STAGES, PlannedRank, set_gradients


def sent_bytes(config: RunConfig, planned: PlannedRank) -> dict[str, float]:
    """Kind → bytes that this rank sends in one optimizer step, by the ring convention (docs/layouts.md).

    "optimizer": an ordinary step; "optimizer/refresh": one in which every subspace is renewed. Both are what the
    very code sends that runs on real ranks. "gradients" and "weights" are the engine's, by formula.
    """
    set_gradients(planned)
    refresh, ordinary = _step(planned), _step(planned)
    sent = {**_engine(config, planned), "optimizer": ordinary}
    if refresh != ordinary:
        sent["optimizer/refresh"] = refresh
    return sent


def _step(planned: PlannedRank) -> float:
    before = sum(planned.optimizer.bytes_sent().values())
    planned.optimizer.step()
    return sum(planned.optimizer.bytes_sent().values()) - before


def _engine(config: RunConfig, planned: PlannedRank) -> dict[str, float]:
    assert config.world_size is not None
    assert config.micro_batch_size is not None
    name, world, shards = config.engine.name, config.world_size, planned.shards
    whole = sum(p.numel() for p in planned.network.parameters())
    width = 2 if config.precision in ("bf16", "fp16", "bf16_pure") else 4
    micro_batches = max(1, config.batch_size // (config.micro_batch_size * world))
    around = (shards - 1) / shards
    if name in ("fsdp2", "hsdp"):
        # Layers are gathered for the forward and, if given back, again for the backward pass of every micro-batch;
        # what belongs to the root stays in between.
        layers = sum(p.numel() for layer in decoder_layers(planned.network) for p in layer.parameters())
        times = 2 if config.engine.reshard_after_forward else 1
        gathered = micro_batches * (times * layers + whole - layers) * width * around
        reduced = whole * 4 * around
        if name == "hsdp" and config.engine.replicas:
            replicas = config.engine.replicas
            reduced += 2 * whole * 4 / shards * (replicas - 1) / replicas
        return {"weights": gathered, "gradients": reduced}
    if name in ZERO_STAGES:
        gathers = 2 * micro_batches if name == "zero3" else 1
        # ZeRO-2 and 3 reduce every micro-batch, ZeRO-1 once.
        reductions = 1 if name == "zero1" else micro_batches
        return {"weights": gathers * whole * width * around, "gradients": reductions * whole * width * around}
    copies = 2 if config.precision == "bf16_pure" else 4
    return {"weights": 0.0, "gradients": 2 * whole * copies * (world - 1) / world}
