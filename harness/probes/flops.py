"""FLOPs of a model, and the peak rate of the device that trains it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from harness.config.model_keys import is_encoder
from harness.config.schema import Precision
from harness.device_specs import Format, device_spec

FORMULA = (
    "6*(matrix parameters without input embedding; 4 for frozen ones) + 6*layers*heads*head_dim*seq_len per token "
    "(12 for encoders), forward and backward, causal attention"
)


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
        seq_len: float,
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
            seq_len: tokens of the sequence that a token is in, on average over tokens.
            precision: of the run; with fp32, the peak is that of TF32 where torch may use it.
            device: that the model is trained on.
            peak_flops: dense peak of the device in FLOP/s; None: by its name, where that is known.
        """
        embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
        head = getattr(model, "get_output_embeddings", lambda: None)()
        # A tied head multiplies with the embedding's matrix, so that matrix counts once as a head.
        tied = {id(head.weight)} & embeddings if head is not None else set()
        # Of a frozen matrix no gradient is computed, only that of its input.
        per_number = {True: 6.0, False: 4.0}
        matrices = sum(
            per_number[p.requires_grad] * p.numel()
            for p in model.parameters()
            if p.ndim >= 2 and (id(p) not in embeddings or id(p) in tied)
        )
        config: Any = model.config
        heads = config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        attention = config.num_hidden_layers * heads * head_dim * seq_len
        if is_encoder(config.model_type) and not getattr(config, "is_decoder", False):
            attention *= 2  # every token sees the whole row
        return cls(matrices + 6.0 * attention, peak_flops or _peak(precision, device))


def _peak(precision: Precision, device: torch.device) -> float | None:
    if device.type != "cuda":
        return None
    spec = device_spec(torch.cuda.get_device_name(device))
    return None if spec is None else spec.peak(matmul_format(precision))


def matmul_format(precision: Precision) -> Format:
    """Return the number format in which a GPU multiplies the matrices of a run, as torch is set now."""
    if precision == "fp32":
        return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "fp32"
    return "fp16" if precision == "fp16" else "bf16"
