"""Peak rates of GPUs from the vendors' data sheets, found by the device's name."""

from __future__ import annotations

import re

BF16_PEAK_FLOPS: dict[str, float] = {
    "B200": 2250e12,
    "GB200": 2500e12,
    "H200": 989e12,
    "GH200": 989e12,
    "H100": 989e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H800": 989e12,
    "H20": 148e12,
    "A100": 312e12,
    "A800": 312e12,
    "A30": 165e12,
    "A40": 150e12,
    "A10": 125e12,
    "A10G": 70e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L20": 119.5e12,
    "L4": 121e12,
    "RTX 3090": 71e12,
    "RTX 4090": 165e12,
    "MI300X": 1307e12,
    "MI325X": 1307e12,
}
"""Words of a device's name → dense bf16 FLOP/s with fp32 accumulation, without sparsity."""


def bf16_peak(name: str) -> float | None:
    """Return the dense bf16 peak of a device, or None if it is unknown.

    Whole words of the name are compared, so that an L40 is not taken for an L4 nor an A10G for an A10; the entry with
    the most words counts. A slice of a GPU (MIG) and a mobile version have an
    unknown share of the peak.

    Args:
        name: as the driver reports it, such as "NVIDIA H100 80GB HBM3" or "NVIDIA A100-SXM4-80GB MIG 1g.10gb".

    Returns:
        FLOP/s, or None.
    """
    present = _words(name)
    if present & {"MIG", "LAPTOP", "MOBILE"}:
        return None
    matching = [entry for entry in BF16_PEAK_FLOPS if _words(entry) <= present]
    return BF16_PEAK_FLOPS[max(matching, key=lambda entry: len(_words(entry)))] if matching else None


def _words(name: str) -> set[str]:
    return {word.upper() for word in re.split(r"[^A-Za-z0-9.]+", name) if word}
