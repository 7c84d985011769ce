"""Stage 1: what the figures of all other stages were measured on."""

from __future__ import annotations

from typing import Any

import torch
from torch.cuda import nccl

from benchmarks.gpu_check.record import StageContext
from benchmarks.gpu_check.runs import interleaved_ms
from harness import devices
from harness.device_specs import device_spec

_SIZES = {"bf16": (torch.bfloat16, 8192), "fp32": (torch.float32, 4096), "fp64": (torch.float64, 2048)}
"""Dtype and side of the products: milliseconds each on a data-centre GPU."""
_LEAST, _MOST = 0.2, 1.05
"""Share of the data sheet's peak that a plain product reaches on a healthy GPU by a wide margin, and cannot exceed."""

_LARGEST = 1.08
"""Largest memory that a driver reports over the data sheet's, which is in decimal GB."""

MEMORY = "The device's memory is at least that of the data sheet, and at most 8 % more."
PEAK = "The data sheet's peak rates are this device's: a plain product reaches 20 to 105 % of them."


def run(context: StageContext) -> None:
    """Report device, versions and the rate of plain products per dtype."""
    facts = _facts(context)
    context.check("machine", "Device, driver and versions are known.", bool(facts["device"]), facts)
    name = devices.device_name(context.device)
    spec = device_spec(name) if context.is_cuda else None
    if spec is not None:
        total = torch.cuda.get_device_properties(context.device).total_memory
        share = total / spec.memory
        context.check("memory", MEMORY, 1 <= share <= _LARGEST, {"ratio": share})
    else:
        reason = f"no data sheet is known for {name}" if context.is_cuda else "needs CUDA"
        context.not_run("memory", MEMORY, reason)
    rows: list[list[Any]] = []
    for label, (dtype, side) in _SIZES.items():
        rate = product_rate(context, dtype, 128 if context.quick else side)
        peak = getattr(spec, label) if spec is not None else None
        rows.append([label, rate / 1e12, None if peak is None else peak / 1e12])
        figures = {"share": None if peak is None else rate / peak}
        if peak is None:
            reason = f"no peak is known for {name}" if context.is_cuda else "needs CUDA"
            context.not_run(f"{label} peak", PEAK, reason, figures)
        else:
            context.check(f"{label} peak", PEAK, _LEAST <= rate / peak <= _MOST, figures)
    context.table("Rate of a plain product", ["dtype", "TFLOP/s", "data sheet"], rows)


def _facts(context: StageContext) -> dict[str, Any]:
    facts = devices.environment(context.device, 1)
    packages = {name: version for name, version in facts["packages"].items() if version}
    keep = {key: value for key, value in facts.items() if isinstance(value, str | int | float | bool)}
    more: dict[str, Any] = {}
    if context.is_cuda:
        properties = torch.cuda.get_device_properties(context.device)
        more = {
            "gpus": torch.cuda.device_count(),
            "memory_gb": properties.total_memory / 1e9,
            "capability": ".".join(map(str, torch.cuda.get_device_capability(context.device))),
            "nccl": ".".join(map(str, nccl.version())),
            "cudnn": torch.backends.cudnn.version(),
        }
    return {**keep, **more, **packages}


def product_rate(context: StageContext, dtype: torch.dtype, side: int) -> float:
    """Return the FLOP/s of a square product; fp32 without TF32."""
    left = torch.randn(side, side, device=context.device).to(dtype)
    median = interleaved_ms({"product": lambda: left @ left}, context.device, 3 if context.quick else 9)
    return 2 * side**3 / (median["product"] * 1e-3)
