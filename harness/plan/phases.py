"""Put the bytes of a rank together, phase by phase, and compare the largest phase with a device's memory."""

from __future__ import annotations

from typing import Any

from torch import nn

from harness.config.deepspeed_config import effective
from harness.config.engine_checks import reduces_every_micro_batch
from harness.config.schema import ZERO, RunConfig
from harness.model import decoder_layers
from harness.plan.activations import HALF, Activations

_SHARDED = ("fsdp2", "hsdp", "zero3")
_DEEPSPEED_BUCKET = 500_000_000
"""Elements of DeepSpeed's reduction bucket by default (0.19.8, runtime/zero/config.py: reduce_bucket_size)."""


def gathered_weights(config: RunConfig, network: nn.Module) -> int:
    """Return the bytes of gathered weights: two layers (one is prefetched) and the parameters outside the layers."""
    if config.engine.name not in _SHARDED:
        return 0
    layers, root = _sizes(network)
    stays = config.engine.name in ("fsdp2", "hsdp") and not config.engine.reshard_after_forward
    held = sum(layers) if stays else 2 * max(layers, default=0)
    return (root + held) * _width(config)


def communication_buffers(config: RunConfig, network: nn.Module) -> int:
    """Return the bytes that gradients take between backward pass and reduction, at the worst moment.

    Frozen weights have none. `fully_shard` holds the whole gradients of a group in the compute dtype and its fp32 input
    of the reduce-scatter (torch 2.13, `FSDPParamGroup.post_backward`). DDP's buckets are the gradients themselves
    (`gradient_as_bucket_view`), and one parameter's gradient exists besides them before it is copied. DeepSpeed
    allocates its bucket in full, and reduces a copy in fp32.
    """
    name = config.engine.name
    layers, root = _sizes(network, trained=True)
    largest = max((p.numel() for p in network.parameters() if p.requires_grad), default=0)
    total = sum(layers) + root
    if name in ("single", "ddp"):
        return largest * (2 if config.precision == "bf16_pure" else 4)
    if name in ("fsdp2", "hsdp"):
        return max(root, largest + max(layers, default=0)) * (_width(config) + 4)
    bucket = effective(config)["zero_optimization"].get("reduce_bucket_size", _DEEPSPEED_BUCKET)
    bucket = _DEEPSPEED_BUCKET if bucket == "auto" else int(bucket)
    if name == "zero0":
        return 4 * min(bucket, total)
    width = _width(config)
    return bucket * width + (4 * min(bucket, total) if width == 2 else 0)


def build_bytes(config: RunConfig, network: nn.Module, held: dict[str, int]) -> dict[str, int]:
    """Return the bytes on the device at the end of the start, by kind.

    Random weights are made parameter by parameter where they belong, so that one fp32 parameter exists besides the
    shards. A model whose weights come from a folder, or draws outside of the meta device, is whole on every device at
    first.
    """
    width = 2 if config.precision == "bf16_pure" else 4
    largest = max((p.numel() for p in network.parameters()), default=0)
    found = {kind: size for kind, size in held.items() if kind == "weights" or kind.startswith("optimizer/")}
    if config.engine.name == "ddp":
        found["gradients"] = held["gradients"]
    is_divided = config.engine.name in _SHARDED or config.engine.name in ZERO[1:]
    if is_divided and config.model.path is not None:
        found["whole_weights"] = sum(p.numel() for p in network.parameters()) * width
    else:
        found["parameter_in_the_making"] = largest * 4
    return found


def phases(
    config: RunConfig,
    per_rank: dict[str, int],
    build: dict[str, int],
    kept: Activations | None,
    work: dict[str, int],
) -> dict[str, dict[str, Any]]:
    """Return each phase with its bytes by kind, their sum, and for checkpoints the bytes in host memory.

    Args:
        config: checked.
        per_rank: kind → bytes of the forward and backward pass.
        build: of the start.
        kept: activations of a micro-batch; None: unknown, and left out.
        work: "step", "refresh" and "probe" → bytes of temporaries of an ordinary step, of one with a refresh, and of
            a probe of the moments.
    """
    state = {
        kind: size for kind, size in per_rank.items() if kind == "weights" or kind.startswith("optimizer/")
    }
    buckets = {"gradients": per_rank["gradients"]} if config.engine.name == "ddp" else {}
    gathered = {kind: per_rank[kind] for kind in ("gathered_weights", "autocast_copies") if kind in per_rank}
    evaluation = {**state, **buckets, **gathered, "batch": per_rank["batch"]}
    if kept is not None:
        # Without gradients a layer's temporaries are given back before the next layer.
        evaluation |= {"activations": kept.layer, "logits": per_rank["logits"]}
    stepping = {**state, "gradients": _reduced_gradients(config, per_rank)}
    if config.precision == "bf16_pure" and "optimizer/average" in per_rank:
        # Half-precision weights are kept while averages are in their place.
        evaluation["kept_weights"] = per_rank["weights"]
    by_phase = {
        "build": build,
        "forward_backward": per_rank,
        "optimizer_step": {**stepping, "workspace": work["step"]},
        "refresh_step": {**stepping, "workspace": work["refresh"]},
        "evaluation": evaluation,
        "probes": {**stepping, "workspace": work["probe"]},
        "checkpoint": {**state, **buckets},
    }
    result: dict[str, dict[str, Any]] = {
        name: {"bytes": kinds, "total_bytes": sum(kinds.values())} for name, kinds in by_phase.items()
    }
    # Pinned copies, in host memory; of replicated weights and state only rank 0 writes.
    result["checkpoint"]["host_bytes"] = sum(state.values()) if config.checkpoint.background else 0
    return result


def _reduced_gradients(config: RunConfig, per_rank: dict[str, int]) -> int:
    """Return the bytes of gradients once they are reduced: whole ones of micro-batches are gone then."""
    if config.engine.name in ("fsdp2", "hsdp") and not reduces_every_micro_batch(config):
        return min(per_rank["gradients"], 2 * per_rank["weights"])
    return per_rank["gradients"]


def _width(config: RunConfig) -> int:
    return 2 if config.precision in HALF else 4


def _sizes(network: nn.Module, *, trained: bool = False) -> tuple[list[int], int]:
    """Return the (trained) parameters of each decoder layer, and of all that is outside of them."""

    def size(module: nn.Module) -> int:
        return sum(p.numel() for p in module.parameters() if p.requires_grad or not trained)

    layers = [size(layer) for layer in decoder_layers(network)]
    return layers, size(network) - sum(layers)
