"""Estimate what a run holds, sends and computes on its worst rank, and whether and how fast it runs on a device."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from harness.config.memory_estimate import CONTEXT_BYTES, FRAGMENTATION, RESERVE, needed_bytes
from harness.config.schema import RunConfig
from harness.device_specs import NETWORK_BANDWIDTH, DeviceSpec, device_spec
from harness.errors import InputError
from harness.plan import activations, phases
from harness.plan.simulated_rank import (
    StepCost,
    build_model,
    engine_traffic,
    held_bytes,
    layer_count,
    optimizer_steps,
    planned_head,
    probe_workspace,
    sampled_ranks,
    simulate,
    with_layers,
)
from harness.plan.step_time import NAMED, StepWork, step_time
from harness.probes.flops import FlopCount

MAX_DEPTH = 128
"""Largest number of layers that is simulated; deeper models are extrapolated from two depths."""


def plan(
    config: RunConfig,
    device_memory: int | None = None,
    say: Callable[[str], None] = lambda text: None,
    *,
    device: str | None = None,
    network: float = NETWORK_BANDWIDTH,
) -> dict[str, Any]:
    """Return the plan of a checked configuration.

    Args:
        config: checked.
        device_memory: bytes of one device, for `fits`; None: unknown.
        say: where progress goes.
        device: name of the device (`harness.device_specs`); None: times of several.
        network: byte/s of each device between nodes.

    Returns:
        `per_rank` {kind: bytes} of the forward and backward pass and its sum `total_bytes`; `phases` {phase: {"bytes",
        "total_bytes"}}, the largest of them `peak_phase`, and `needed_bytes`, the device memory for it (`margin` says
        what is added); `traffic_per_step` {kind: bytes}, all of the worst rank; `flops_per_step` {kind: FLOPs} of all
        ranks; `fits` (None: activations or memory unknown); `activations` {kind: bytes} of a micro-batch;
        `step_time_s` {device: {part: s}}.

    Raises:
        InputError: an optimizer by import path, a model that cannot be built, or an unknown device.
    """
    if config.optimizer.target is not None:
        reason = "cannot be planned: only the optimizers of optbench have a known state"
        raise InputError("optimizer.target", config.optimizer.target, reason, fix="optimizer=adamw")
    specs = {
        name: spec for name in ([device] if device else NAMED) if (spec := device_spec(name)) is not None
    }
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
    counted = plans[-1] if len(plans) == 1 else _extrapolated(plans, depths, layers or 0)
    say("activations")
    kept = _activations(config, layers)
    per_rank: dict[str, int] = counted["per_rank"]
    if kept is not None:
        by_mode = {"none": kept.kept, "selective": kept.selective, "full": kept.recomputed}
        used = by_mode[config.model.activation_checkpointing]
        per_rank |= {"activations": used, "logits": kept.logits}
        if kept.casts:
            per_rank["autocast_copies"] = kept.casts
    by_phase = phases.phases(config, per_rank, counted["build"], kept, counted["workspace"])
    peak_phase = max(by_phase, key=lambda name: by_phase[name]["total_bytes"])
    needed = needed_bytes(by_phase[peak_phase]["total_bytes"])
    traffic = counted["traffic_per_step"]
    return {
        "world_size": config.world_size,
        "engine": config.engine.name,
        "ranks_looked_at": list(sampled_ranks(config)),
        "depths_looked_at": depths,
        "per_rank": per_rank,
        "total_bytes": sum(per_rank.values()),
        "phases": by_phase,
        "peak_phase": peak_phase,
        "needed_bytes": needed,
        "margin": {
            "context_bytes": round(CONTEXT_BYTES),
            "fragmentation": FRAGMENTATION,
            "reserve": round(1 - RESERVE, 4),
        },
        "traffic_per_step": traffic,
        "flops_per_step": counted["flops_per_step"],
        "activations": None
        if kept is None
        else {
            "micro_batch_size": config.micro_batch_size,
            "without_checkpointing": kept.kept,
            "with_checkpointing": kept.recomputed,
            "logits": kept.logits,
        },
        "device_memory": device_memory,
        "fits": None if kept is None or device_memory is None else needed <= device_memory,
        "step_time_s": _step_times(config, counted, specs, network),
    }


def _at_depth(config: RunConfig, depth: int | None, say: Callable[[str], None]) -> dict[str, Any]:
    """Return groups of numbers by kind, all of which are linear in the depth."""
    model = config.model if depth is None else with_layers(config.model, depth)
    say(f"model on the meta device{f', {depth} layers' if depth else ''}")
    module = build_model(
        model, config.precision, trust_remote_code=config.trust_remote_code, head=planned_head(config)
    )
    held: dict[str, int] = {}
    sent: dict[str, float] = {}
    work: dict[str, float] = {}
    workspace: dict[str, int] = {}
    ranks = sampled_ranks(config)
    for place, rank in enumerate(ranks):
        say(f"rank {rank} ({place + 1} of {len(ranks)})")
        planned = simulate(config, module, rank)
        refresh, ordinary = optimizer_steps(planned)
        traffic = {**engine_traffic(config, planned), "optimizer": ordinary.sent}
        if refresh.sent != ordinary.sent:
            traffic["optimizer/refresh"] = refresh.sent
        _raise(held, held_bytes(config, planned))
        _raise(sent, traffic)
        _raise(work, {**_work("step", ordinary), **_work("refresh", refresh)})
        probe = probe_workspace(planned)
        _raise(workspace, {"step": ordinary.workspace, "refresh": refresh.workspace, "probe": probe})
    if gathered := phases.gathered_weights(config, module):
        held["gathered_weights"] = gathered
    held["communication"] = phases.communication_buffers(config, module)
    # Two micro-batches of int64 tokens and labels: the next one is on its way.
    held["batch"] = 2 * 2 * 8 * (config.micro_batch_size or 1) * config.seq_len
    flops = FlopCount.of(
        module, seq_len=config.seq_len, precision=config.precision, device=torch.device("cpu")
    )
    return {
        "per_rank": held,
        "build": phases.build_bytes(config, module, held),
        "workspace": workspace,
        "work": work,
        "traffic_per_step": {kind: round(size) for kind, size in sent.items()},
        "flops_per_step": {"forward_backward": flops.per_token * config.batch_size * config.seq_len},
    }


def _raise(highest: dict[str, Any], values: Mapping[str, float]) -> None:
    for kind, value in values.items():
        highest[kind] = max(highest.get(kind, 0), value)


def _work(step: str, cost: StepCost) -> dict[str, float]:
    flops = {f"{step}/flops/{kind}": count for kind, count in cost.flops.items()}
    return {f"{step}/moved": cost.moved, f"{step}/sent": cost.sent, **flops}


def _extrapolated(plans: list[dict[str, Any]], depths: list[Any], layers: int) -> dict[str, Any]:
    """Extrapolate from two depths to ``layers``: every layer adds the same."""
    less, more = plans
    steps = (layers - depths[1]) / (depths[1] - depths[0])

    def at(group: str, kind: str) -> float:
        value, before = more[group][kind], less[group].get(kind, 0)
        return value + (value - before) * steps

    exact = ("flops_per_step", "work")
    return {
        group: {kind: at(group, kind) if group in exact else round(at(group, kind)) for kind in values}
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


def _step_times(
    config: RunConfig, counted: dict[str, Any], specs: Mapping[str, DeviceSpec], network: float
) -> dict[str, Any] | None:
    """Return the times of a step by device; None: no device computes in this precision."""
    assert config.world_size is not None
    work, traffic = counted["work"], counted["traffic_per_step"]
    flops = sum(counted["flops_per_step"].values()) / config.world_size

    def products(step: str) -> dict[str, float]:
        start = f"{step}/flops/"
        return {kind.removeprefix(start): count for kind, count in work.items() if kind.startswith(start)}

    # A recomputed forward pass is a third of forward and backward; selectively, half of its products are kept.
    recomputed = {"none": 1.0, "selective": 7 / 6, "full": 4 / 3}[config.model.activation_checkpointing]
    interval = config.optimizer.options.get("refresh_interval")
    step = StepWork(
        model_flops=flops * recomputed,
        optimizer_flops=products("step"),
        refresh_flops=products("refresh"),
        optimizer_moved=work["step/moved"],
        refresh_moved=work["refresh/moved"],
        engine_sent=traffic["weights"] + traffic["gradients"],
        optimizer_sent=work["step/sent"],
        refresh_sent=work["refresh/sent"],
        refresh_interval=interval if isinstance(interval, int) else None,
    )
    times = {name: step_time(config, spec, step, network) for name, spec in specs.items()}
    return {name: time for name, time in times.items() if time is not None} or None
