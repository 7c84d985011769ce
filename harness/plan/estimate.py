"""Estimate what a run holds, sends and computes on its worst rank."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from harness.config.schema import RunConfig
from harness.device_specs import device_spec
from harness.errors import InputError
from harness.model import decoder_layers
from harness.plan import activations
from harness.plan.simulated_rank import (
    build_model,
    held_bytes,
    layer_count,
    sampled_ranks,
    sent_bytes,
    simulate,
    with_layers,
)
from harness.probes.flops import FlopCount

MAX_DEPTH = 128
"""Largest number of layers that is simulated; deeper models are extrapolated from two depths."""
_DEVICES = ("A100", "H100", "B200")
_SHARDED = ("fsdp2", "hsdp", "zero3")


def plan(
    config: RunConfig, device_memory: int | None = None, say: Callable[[str], None] = lambda text: None
) -> dict[str, Any]:
    """Return the plan of a checked configuration.

    Args:
        config: checked.
        device_memory: bytes of one device, for `fits`; None: unknown.
        say: where progress goes.

    Returns:
        `per_rank` {kind: bytes} and its sum `total_bytes`, and `traffic_per_step` {kind: bytes}, all of the worst rank;
        `flops_per_step` {kind: FLOPs} of all ranks; `fits` (None: activations or memory unknown); `activations`
        {kind: bytes} of a micro-batch; `step_time_s` {device: {kind: s}}.

    Raises:
        InputError: an optimizer by import path, or a model that cannot be built.
    """
    if config.optimizer.target is not None:
        reason = "cannot be planned: only the optimizers of optbench have a known state"
        raise InputError("optimizer.target", config.optimizer.target, reason, fix="optimizer=adamw")
    # Python code from the model's folder is run as it is, at its own depth.
    has_own_code = config.trust_remote_code and config.model.path is not None
    layers = None if has_own_code else layer_count(config.model)
    depths = [layers] if layers is None or layers <= MAX_DEPTH else [MAX_DEPTH // 2, MAX_DEPTH]
    try:
        plans = [_at_depth(config, depth, say) for depth in depths]
    except (RuntimeError, OverflowError, TypeError, ValueError, MemoryError) as error:
        first = next(iter(str(error).splitlines()), type(error).__name__)
        raise InputError(
            "model", config.model.name, f"cannot be planned ({first})", fix="model=llama_60m"
        ) from error
    estimates = plans[-1] if len(plans) == 1 else _extrapolated(plans, depths, layers or 0)
    say("activations")
    kept = _activations(config, layers)
    if kept is not None:
        used = kept.recomputed if config.model.activation_checkpointing else kept.kept
        estimates["per_rank"] |= {"activations": used, "logits": kept.logits}
    total = sum(estimates["per_rank"].values())
    flops = sum(estimates["flops_per_step"].values())
    return {
        "world_size": config.world_size,
        "engine": config.engine.name,
        "ranks_looked_at": list(sampled_ranks(config)),
        "depths_looked_at": depths,
        **estimates,
        "total_bytes": total,
        "activations": None
        if kept is None
        else {
            "micro_batch_size": config.micro_batch_size,
            "without_checkpointing": kept.kept,
            "with_checkpointing": kept.recomputed,
            "logits": kept.logits,
        },
        "device_memory": device_memory,
        "fits": None if kept is None or device_memory is None else total <= device_memory,
        "step_time_s": _step_time(config, flops),
    }


def _at_depth(config: RunConfig, depth: int | None, say: Callable[[str], None]) -> dict[str, Any]:
    model = config.model if depth is None else with_layers(config.model, depth)
    say(f"model on the meta device{f', {depth} layers' if depth else ''}")
    module = build_model(model, config.precision, trust_remote_code=config.trust_remote_code)
    held: dict[str, int] = {}
    sent: dict[str, float] = {}
    ranks = sampled_ranks(config)
    for place, rank in enumerate(ranks):
        say(f"rank {rank} ({place + 1} of {len(ranks)})")
        planned = simulate(config, module, rank)
        for kind, size in {**held_bytes(config, planned), **_gathered(config, module)}.items():
            held[kind] = max(held.get(kind, 0), size)
        for kind, size in sent_bytes(config, planned).items():
            sent[kind] = max(sent.get(kind, 0.0), size)
    flops = FlopCount.of(
        module, seq_len=config.seq_len, precision=config.precision, device=torch.device("cpu")
    )
    return {
        "per_rank": held,
        "traffic_per_step": {kind: round(size) for kind, size in sent.items()},
        "flops_per_step": {"forward_backward": flops.per_token * config.batch_size * config.seq_len},
    }


def _gathered(config: RunConfig, module: nn.Module) -> dict[str, int]:
    """Return the bytes of gathered weights: two layers (one is prefetched) and the parameters outside the layers."""
    if config.engine.name not in _SHARDED:
        return {}
    width = 2 if config.precision in activations.HALF else 4
    sizes = [sum(p.numel() for p in layer.parameters()) for layer in decoder_layers(module)]
    whole = sum(p.numel() for p in module.parameters())
    stays = config.engine.name in ("fsdp2", "hsdp") and not config.engine.reshard_after_forward
    layers = sum(sizes) if stays else 2 * max(sizes, default=0)
    return {"gathered_weights": (whole - sum(sizes) + layers) * width}


def _extrapolated(plans: list[dict[str, Any]], depths: list[Any], layers: int) -> dict[str, Any]:
    """Extrapolate from two depths to ``layers``: every layer adds the same."""
    less, more = plans
    steps = (layers - depths[1]) / (depths[1] - depths[0])

    def at(group: str, kind: str) -> float:
        value, before = more[group][kind], less[group].get(kind, 0)
        return value + (value - before) * steps

    return {
        group: {
            kind: at(group, kind) if group == "flops_per_step" else round(at(group, kind)) for kind in values
        }
        for group, values in more.items()
    }


def _activations(config: RunConfig, layers: int | None) -> activations.Activations | None:
    if layers is None:
        return None
    try:
        return activations.count(config, layers)
    except Exception:
        # The code of some model families cannot run on fake tensors; the plan says that they are not counted.
        return None


def _step_time(config: RunConfig, flops: float) -> dict[str, dict[str, float]] | None:
    """Return the seconds of forward and backward pass at the peak of each known device, a lower bound."""
    assert config.world_size is not None
    if config.precision not in activations.HALF:
        return None
    peaks = {name: spec.bf16 for name in _DEVICES if (spec := device_spec(name))}
    return {
        name: {"forward_backward_at_peak": flops / config.world_size / peak}
        for name, peak in peaks.items()
        if peak
    }
