"""Activation checkpointing of decoder layers: full, or selective by operator.

Selective keeps what is dear to compute again for its bytes: the output of attention, and of every second matrix
product, as torchtitan does. In a Llama layer these are the outputs of the query, value, gate and down projections.
Everything else is computed again from the layer's input in the backward pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.checkpoint import (
    CheckpointPolicy,
    SelectiveCheckpointContext,
    create_selective_checkpoint_contexts,
)

_aten = torch.ops.aten
PRODUCTS = frozenset({_aten.mm.default, _aten.addmm.default, _aten.bmm.default, _aten._grouped_mm.default})
"""Matrix products of linear layers and experts: the first, third, … output of a layer is kept."""
ATTENTION = frozenset(
    {
        _aten._scaled_dot_product_flash_attention.default,
        _aten._scaled_dot_product_efficient_attention.default,
        _aten._scaled_dot_product_cudnn_attention.default,
        _aten._scaled_dot_product_flash_attention_for_cpu.default,
    }
)
"""Kernels behind `scaled_dot_product_attention`: their output and log-sum-exp are always kept."""


def enable(model: Any, mode: str) -> None:
    """Recompute activations of decoder layers in the backward pass.

    Gradients keep their bits, because the same operators run again on the same inputs.

    Args:
        model: a `transformers` model.
        mode: the key ``model.activation_checkpointing``: none, selective or full.

    Raises:
        ValueError: the model does not support it.
    """
    if mode == "none":
        return
    options: dict[str, Any] = {"use_reentrant": False}
    if mode == "selective":
        options["context_fn"] = _selective_contexts
    model.activation_checkpointing_enable(options)


def _selective_contexts() -> tuple[Any, Any]:
    """Return the contexts of one layer's forward pass and recomputation."""
    products = {False: 0, True: 0}

    def policy(context: SelectiveCheckpointContext, func: Any, *_: Any, **__: Any) -> CheckpointPolicy:
        is_kept = func in ATTENTION
        if func in PRODUCTS:
            # Counted apart: the recomputation has to choose what the forward pass chose.
            products[context.is_recompute] += 1
            is_kept = products[context.is_recompute] % 2 == 1
        return CheckpointPolicy.MUST_SAVE if is_kept else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)
