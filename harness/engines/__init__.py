"""Engines: who holds the weights and how gradients are shared. All follow `harness.protocols.Engine`."""

from __future__ import annotations

from importlib import import_module

from harness.config.schema import RunConfig
from harness.protocols import Engine

__all__ = ["start"]

_ENGINES = {
    "single": "harness.engines.ddp:ReplicatedEngine",
    "ddp": "harness.engines.ddp:ReplicatedEngine",
    "fsdp2": "harness.engines.fsdp2:ShardedEngine",
    "hsdp": "harness.engines.fsdp2:ShardedEngine",
    "zero0": "harness.engines.deepspeed:UnpartitionedEngine",
    "zero1": "harness.engines.deepspeed:PartitionedEngine",
    "zero2": "harness.engines.deepspeed:PartitionedEngine",
    "zero3": "harness.engines.deepspeed:PartitionedEngine",
}
"""Name → class, by name: each engine imports its own library."""


def start(config: RunConfig) -> Engine:
    """Start this process' part of the engine that ``config.engine`` names (a collective)."""
    module, name = _ENGINES[config.engine.name].split(":")
    return getattr(import_module(module), name)(config)
