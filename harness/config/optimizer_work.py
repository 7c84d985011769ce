"""`engine.optimizer_work=auto`: whether replicas compute every matrix, or divide them and send updates. No torch.

One layer of the model decides, because all layers are alike. Divided, a process computes 1/W of the matrices and
receives the updates of the others: (1 - 1/W)·FLOP of work are saved, (1 - 1/W)·bytes are sent. So W cancels, and the
work is divided where FLOP / (FLOP/s) > 2 · bytes / (byte/s).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal

from harness.config.gpus import Gpu
from harness.device_specs import NETWORK_BANDWIDTH, PCIE_BANDWIDTH, DeviceSpec, device_spec

Work = Literal["split", "replicated"]

_REACHED_FLOPS, _REACHED_BANDWIDTH = 0.55, 0.4
"""Shares of the data sheet's rates: high for products and low for collectives, so that a doubtful case stays as it is.
Assumptions, no measurements."""
_MARGIN = 2.0
"""How much longer the products must take than the sending, which also needs launches and a part of the GPU."""
_ASSUMED = "H100"
"""GPUs of other machines, of which only the number is known, count as recent ones."""


def resolved(
    wanted: Literal["auto", "split", "replicated"],
    options: Mapping[str, Any],
    shapes: Collection[tuple[int, int]],
    gpus: Sequence[Gpu],
    world_size: int,
) -> Work:
    """Return `engine.optimizer_work` with "auto" replaced by what takes less time.

    On CPUs, and where the model's matrices or the GPU's rates are not known, every process computes everything. So it
    does under rules in a subspace: dividing SUMO leaves its last product to all of them, and was not measured on GPUs.

    Args:
        wanted: as given.
        options: resolved options of the optimizer; those of a plug-in are not known here.
        shapes: of the hidden matrices of one layer.
        gpus: of this machine that the run will use; none on a CPU.
        world_size: processes.
    """
    if wanted != "auto":
        return wanted
    spec = device_spec(gpus[0].name or _ASSUMED) if gpus else None
    if spec is None or world_size == 1 or "orthogonalizer" not in options or "rank" in options:
        return "replicated"
    link = (spec.link or PCIE_BANDWIDTH) if world_size <= len(gpus) else NETWORK_BANDWIDTH
    computed = sum(_seconds(shape, options, spec) for shape in shapes)
    sent = sum(4.0 * m * n for m, n in shapes) / (link * _REACHED_BANDWIDTH)
    return "split" if computed > _MARGIN * sent else "replicated"


def _seconds(shape: tuple[int, int], options: Mapping[str, Any], spec: DeviceSpec) -> float:
    """Return the time in which one process orthogonalizes a matrix at `_REACHED_FLOPS` of the peak."""
    short, long = min(shape), max(shape)
    if options["orthogonalizer"] in ("newton_schulz", "cubic", "polar_express"):
        # X·Xᵀ and B·X cost 2·long·short² each, (X·Xᵀ)² costs 2·short³.
        flops = options["orthogonalizer_steps"] * (4.0 * long * short**2 + 2.0 * short**3)
        is_half = options["orthogonalizer_dtype"] != "float32" and spec.bf16 is not None
        peak = spec.bf16 if is_half else spec.fp32
    else:
        # An fp64 Gram, and about ten products' worth of its eigenproblem.
        flops, peak = 2.0 * long * short**2 + 20.0 * short**3, spec.fp64
    return flops / ((peak or spec.fp32) * _REACHED_FLOPS)
