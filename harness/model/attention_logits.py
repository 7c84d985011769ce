"""The largest attention logit of each head over the batch of a step, for QK-clip (`optimizers.qk_clip`).

Attention itself stays `scaled_dot_product_attention`, which tells no logits; they are computed once more, a block of
queries at a time, so that no more than `BLOCK` rows of a logit matrix exist. That costs one of the two products of the
forward pass of attention.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from optimizers.qk_clip import HeadLogits

CLIPPED = "optbench_causal_logits"
"""Name in transformers' table of attention functions; like `attention.CAUSAL`, it has no mask builder."""
BLOCK = 256
"""Queries whose logits exist at once."""

_BUFFER = "optbench_largest_logits"


def largest_logits(query: torch.Tensor, key: torch.Tensor, scaling: float) -> torch.Tensor:
    """Return (heads,) fp32 maxima of the causal logits qᵀk·scaling over batch and positions.

    Args:
        query: (batch, heads, length, dim).
        key: (batch, key heads, length, dim); query heads share them in order.
        scaling: factor of the logits.
    """
    if torch.is_autocast_enabled(query.device.type):
        # As attention itself; in a compiled graph autocast is off by the time an operator runs.
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key = query.to(dtype), key.to(dtype)
    return _causal_maxima(query, key, scaling)


@torch.library.custom_op("optbench::largest_causal_logits", mutates_args=())
def _causal_maxima(query: torch.Tensor, key: torch.Tensor, scaling: float) -> torch.Tensor:
    # An operator of its own: selective checkpointing would count its products as those of layers and keep them.
    batch, heads, length, dim = query.shape
    shared = heads // key.shape[1]
    grouped = query.reshape(batch, key.shape[1], shared, length, dim)
    keys = key.unsqueeze(2).mT
    positions = torch.arange(length, device=query.device)
    result = torch.full((heads,), -torch.inf, dtype=torch.float32, device=query.device)
    for start in range(0, length, BLOCK):
        end = min(start + BLOCK, length)
        # Causal: no key after the last query of the block.
        logits = (grouped[..., start:end, :] @ keys[..., :end]).float()
        logits = logits.masked_fill(positions[:end] > positions[start:end, None], -torch.inf)
        result = torch.maximum(result, logits.amax((0, 3, 4)).reshape(heads))
    return result * scaling


@_causal_maxima.register_fake
def _(query: torch.Tensor, key: torch.Tensor, scaling: float) -> torch.Tensor:
    return query.new_empty(query.shape[1], dtype=torch.float32)


def _attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    largest = getattr(module, _BUFFER, None)
    if largest is not None and module.training:
        scaling = options.get("scaling")
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        with torch.no_grad():
            found = largest_logits(query.detach(), key.detach(), scaling)
            # In place: recomputing a layer in the backward pass gives the same maximum again.
            largest.copy_(torch.maximum(largest, found))
    return sdpa_attention_forward(module, query, key, value, attention_mask, **options)


AttentionInterface.register(CLIPPED, _attend)


class AttentionLogits:
    """Collect the largest logits of every attention layer of a model, step by step.

    Args:
        network: with `CLIPPED` as its attention function; `problem` of it is None.
        device: of its activations.
    """

    def __init__(self, network: nn.Module, device: torch.device) -> None:
        layers = _layers(network)
        heads = [_heads(module) for _, module in layers]
        self._all = torch.full((sum(q for q, _ in heads),), -torch.inf, device=device)
        self._by_name: dict[str, HeadLogits] = {}
        for (name, module), part, (queries, keys) in zip(
            layers, self._all.split([q for q, _ in heads]), heads
        ):
            # A plain attribute: a buffer would be saved, broadcast and sharded.
            object.__setattr__(module, _BUFFER, part)
            is_shared = keys != queries
            self._by_name[f"{name}.q_proj.weight"] = HeadLogits(part, 1.0 if is_shared else 0.5)
            if not is_shared:
                self._by_name[f"{name}.k_proj.weight"] = HeadLogits(part, 0.5)

    def begin(self) -> None:
        """Forget the maxima of the last step."""
        self._all.fill_(-torch.inf)

    def reduce(self) -> None:
        """Take the maxima over all processes (one all-reduce of as many numbers as the model has heads)."""
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(self._all, dist.ReduceOp.MAX)

    def give(self, optimizer: Any) -> None:
        """Reduce the maxima, and give them to an `optimizers.Optimizer` before its step."""
        self.reduce()
        optimizer.units.clip_attention(self._by_name)


def problem(network: nn.Module) -> str | None:
    """Return why QK-clip cannot act on this model, in a few words, or None."""
    layers = _layers(network)
    if not layers:
        return "no attention with q_proj and k_proj"
    for name, module in layers:
        if any(hasattr(module, norm) for norm in ("q_norm", "k_norm", "q_layernorm", "k_layernorm")):
            return f"normalized queries and keys ({name}), which no factor on W_q and W_k changes"
        if module.q_proj.bias is not None or module.k_proj.bias is not None:
            return f"biases of queries and keys ({name}), which QK-clip does not scale"
    return None


def _layers(network: nn.Module) -> list[tuple[str, Any]]:
    return [
        (name, module)
        for name, module in network.named_modules()
        if isinstance(getattr(module, "q_proj", None), nn.Linear)
        and isinstance(getattr(module, "k_proj", None), nn.Linear)
    ]


def _heads(module: Any) -> tuple[int, int]:
    """Return the numbers of query and key heads."""
    return module.q_proj.out_features // module.head_dim, module.k_proj.out_features // module.head_dim
