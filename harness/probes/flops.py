"""FLOPs of a model, and peak rates of GPUs from the vendors' data sheets."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from harness.config.schema import Precision

FORMULA = (
    "6*(matrix parameters without input embedding) + 6*layers*heads*head_dim*seq_len per token, "
    "forward and backward, causal attention"
)


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


@dataclass(frozen=True)
class FlopCount:
    """FLOPs per trained token and the peak of one device (None where it is not known, e.g. on a CPU)."""

    per_token: float
    peak: float | None

    @classmethod
    def of(
        cls,
        model: nn.Module,
        *,
        seq_len: int,
        precision: Precision,
        device: torch.device,
        peak_flops: float | None = None,
    ) -> FlopCount:
        """Count for a `transformers` model: PaLM's formula (Chowdhery et al. 2022, appendix B) with causal attention.

        Every weight matrix costs 2 FLOPs per parameter and token forward and 4 backward; looking an
        embedding up costs none, a tied head does. Scores and values cost 2·2·heads·head_dim·seq_len/2
        forward per layer (a causal token sees half of the sequence), three times that with the backward pass.

        Args:
            model: with its `config`.
            seq_len: tokens of a sequence.
            precision: of the run; the peaks that are known are those of bf16.
            device: that the model is trained on.
            peak_flops: dense peak of the device in FLOP/s; None: by its name, where that is known.
        """
        embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
        head = getattr(model, "get_output_embeddings", lambda: None)()
        # A tied head multiplies with the embedding's matrix, so that matrix counts once as a head.
        tied = {id(head.weight)} & embeddings if head is not None else set()
        matrices = sum(
            p.numel()
            for p in model.parameters()
            if p.ndim >= 2 and (id(p) not in embeddings or id(p) in tied)
        )
        config: Any = model.config
        heads = config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        attention = config.num_hidden_layers * heads * head_dim * seq_len
        return cls(6.0 * (matrices + attention), peak_flops or _peak(precision, device))


def _peak(precision: Precision, device: torch.device) -> float | None:
    if device.type != "cuda" or precision == "fp32":
        return None  # fp32 may run on tensor cores (TF32) or not: no honest peak
    return bf16_peak(torch.cuda.get_device_name(device))


def bf16_peak(name: str) -> float | None:
    """Return the dense bf16 peak of a device, or None if it is unknown.

    Whole words of the name are compared, so that an L40 is not taken for an L4 nor an A10G for an A10; the entry with
    the most words counts. A slice of a GPU (MIG) and a mobile version have an unknown
    share of the peak.

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
