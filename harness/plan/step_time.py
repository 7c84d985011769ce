"""Bound and estimate the time of a step on named devices, from FLOPs, bytes and data sheets. Nothing here is measured.

Roofline (Williams et al. 2009): work takes the longer of its FLOPs over the peak and its bytes over the bandwidth.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from harness.config.schema import RunConfig
from harness.device_specs import NETWORK_BANDWIDTH, PCIE_BANDWIDTH, DeviceSpec, Format

NAMED = ("A100", "H100", "H200", "B200", "RTX 4090", "MI300X")
"""Devices that are shown if none is asked for."""
GPUS_PER_NODE = 8


@dataclass(frozen=True)
class Efficiency:
    """Shares of the data sheet's rates that a run reaches; assumptions, no measurements.

    Attributes:
        model: of the peak, by forward and backward pass. Published training runs of dense models: 0.4 to 0.52
            (Megatron-LM on A100, Narayanan et al. 2021), 0.33 to 0.45 (torchtitan on H100, Liang et al. 2024).
        bandwidth: of the memory bandwidth, by element-wise kernels.
        decomposition: of the peak of fp64 and fp32, by products and decompositions of small matrices.
        link: of the links' bandwidth, by collectives.
        hidden: of the time of communication that runs beside computation.
    """

    model: float
    bandwidth: float
    decomposition: float
    link: float
    hidden: float


BEST = Efficiency(0.55, 0.9, 0.6, 0.8, 1.0)
WORST = Efficiency(0.3, 0.6, 0.1, 0.4, 0.5)


@dataclass(frozen=True)
class StepWork:
    """What a device does in one step.

    Attributes:
        model_flops: of forward and backward pass, recomputation included.
        optimizer_flops: number format → FLOPs of an ordinary step.
        refresh_flops: the same of a step that refreshes every subspace.
        optimizer_moved, refresh_moved: bytes of device memory that these steps read and write.
        engine_sent: bytes of gradients and weights that the device sends.
        optimizer_sent, refresh_sent: bytes that the optimizer sends.
        refresh_interval: steps from one refresh to the next; None: there is none.
    """

    model_flops: float
    optimizer_flops: Mapping[str, float]
    refresh_flops: Mapping[str, float]
    optimizer_moved: float
    refresh_moved: float
    engine_sent: float
    optimizer_sent: float
    refresh_sent: float
    refresh_interval: int | None


def step_time(
    config: RunConfig, spec: DeviceSpec, work: StepWork, network: float = NETWORK_BANDWIDTH
) -> dict[str, Any] | None:
    """Return the seconds of a step by part: a lower bound, and the band in which a well-tuned run is expected.

    The bound has every rate at its peak, and communication hidden behind computation as far as it fits: the engine's
    behind forward and backward pass, the optimizer's behind the optimizer. It holds for operators that run one by one:
    fused kernels move fewer bytes.

    Args:
        config: checked.
        spec: of the device.
        work: of one step.
        network: byte/s of each device between nodes.

    Returns:
        None if the device lacks the precision's number format.
    """
    format: Format = {"bf16": "bf16", "bf16_pure": "bf16", "fp16": "fp16"}.get(config.precision, "fp32")  # pyright: ignore[reportAssignmentType]
    peak = spec.peak(format)
    if peak is None:
        return None
    ideal = Efficiency(1.0, 1.0, 1.0, 1.0, 1.0)
    bound, best, worst = (_parts(config, spec, peak, work, network, e) for e in (ideal, BEST, WORST))
    tokens = config.batch_size * config.seq_len
    return {
        "forward_backward_at_peak": work.model_flops / peak,
        **bound,
        "expected_from": best["total"],
        "expected_to": worst["total"],
        "tokens_per_s_at_most": tokens / bound["total"],
        "expected_tokens_per_s_from": tokens / worst["total"],
        "expected_tokens_per_s_to": tokens / best["total"],
    }


def _parts(
    config: RunConfig, spec: DeviceSpec, peak: float, work: StepWork, network: float, efficiency: Efficiency
) -> dict[str, float]:
    model = work.model_flops / (peak * efficiency.model)

    def computed(flops: Mapping[str, float], moved: float) -> float:
        products = sum(count / _rate(spec, kind, efficiency) for kind, count in flops.items())
        return max(products, moved / (spec.bandwidth * efficiency.bandwidth))

    assert config.world_size is not None
    wire = spec.link or PCIE_BANDWIDTH
    exchange = wire
    if config.world_size > GPUS_PER_NODE:
        # NCCL runs a ring per adapter: what a rank sends in a ring leaves its node by all adapters together.
        wire = exchange = min(wire, GPUS_PER_NODE * network)
        if efficiency.hidden < 1:
            # In an all-to-all, most of it leaves by the rank's own adapter.
            exchange = min(wire, network)
    ordinary = computed(work.optimizer_flops, work.optimizer_moved)
    refresh = computed(work.refresh_flops, work.refresh_moved)
    share = 1 / work.refresh_interval if work.refresh_interval else 0.0
    engine = work.engine_sent / (wire * efficiency.link)
    # ZeRO-0 reduces after the backward pass, and DeepSpeed overlaps nothing at stages 1 and 2 by default.
    may_hide = config.engine.name not in ("zero0", "zero1", "zero2")
    exposed = max(0.0, engine - efficiency.hidden * model) if may_hide else engine
    sent = (work.optimizer_sent + (work.refresh_sent - work.optimizer_sent) * share) / (
        exchange * efficiency.link
    )
    optimizer = ordinary + (refresh - ordinary) * share
    exposed += max(0.0, sent - efficiency.hidden * optimizer)
    return {
        "model": model,
        "optimizer": optimizer,
        "refresh_step_optimizer": refresh,
        "communication": engine + sent,
        "exposed_communication": exposed,
        "total": model + optimizer + exposed,
    }


def _rate(spec: DeviceSpec, kind: str, efficiency: Efficiency) -> float:
    # Newton-Schulz in half precision is made of large products, as a model is.
    if kind in ("bf16", "fp16"):
        return (spec.peak(kind) or spec.fp32) * efficiency.model
    return (spec.fp64 if kind == "fp64" else spec.fp32) * efficiency.decomposition
