"""Fit the forward pass of a `transformers` model to training: attention without masks, a loss without whole logits."""

from __future__ import annotations

import copy
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from harness.config.schema import ModelConfig
from harness.errors import InputError
from harness.model import attention_logits
from harness.model.attention import CAUSAL, WATCHED, AttentionWatch
from harness.model.inspection import ForwardFacts, inspect
from harness.model.linear_loss import install, whole_logits_suffice


def specialize(
    network: Any, config: ModelConfig, *, seq_len: int, tokens: int, clip_threshold: float | None = None
) -> list[str]:
    """Change how a model computes, not what: attention and loss as far as its code allows it.

    Names of modules and parameters stay. Called before an engine takes the model over.

    Args:
        network: a `transformers` causal language model, with the attention of ``config``.
        config: that it was built from.
        seq_len: tokens of a row.
        tokens: of a micro-batch on one process.
        clip_threshold: `qk_clip_threshold` of the optimizer, for which attention has to tell its largest logits.

    Returns:
        What could not be changed and why, one line each.

    Raises:
        InputError: `clip_threshold` with a model whose logits are not told, or on which QK-clip would not act.
    """
    vocabulary = int(network.config.get_text_config().vocab_size)
    wants_attention = config.attention == "sdpa" and network.config._attn_implementation == "sdpa"
    wants_loss = not whole_logits_suffice(config.loss_chunk, tokens, vocabulary)
    if not wants_attention and not wants_loss and clip_threshold is None:
        return []
    facts = _facts(_Class(network), seq_len)
    notes: list[str] = []
    if clip_threshold is not None:
        reason = facts.attention_problem if wants_attention else f"attention={config.attention}"
        reason = reason or attention_logits.problem(network)
        if reason is not None:
            raise InputError(
                "optimizer.qk_clip_threshold",
                clip_threshold,
                f"needs plain causal attention (model.attention=sdpa), and {config.model_type} has {reason}",
                allowed="null, or a model such as model=llama_60m",
                fix="optimizer.qk_clip_threshold=null",
            )
        network.set_attn_implementation(attention_logits.CLIPPED)
    elif wants_attention and facts.attention_problem is None:
        network.set_attn_implementation(CAUSAL)
    elif wants_attention:
        notes.append(
            f"attention with transformers' own masks: {config.model_type} has {facts.attention_problem}"
        )
    if wants_loss and facts.head_problem is None:
        install(network)
    elif wants_loss:
        notes.append(f"loss from whole logits: {config.model_type} has {facts.head_problem}")
    return notes


class _Class:
    """A class and a configuration of `transformers`, equal to another if they build the same modules."""

    def __init__(self, network: Any) -> None:
        self._type, self._config = type(network), network.config
        self._key = (self._type, self._config.to_json_string())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Class) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    def on_meta(self, attention: str) -> nn.Module:
        """Build the model on the meta device."""
        # A copy: the constructor writes the attention function into the configuration that it is given.
        config = copy.deepcopy(self._config)
        with torch.device("meta"):
            return self._type._from_config(config, attn_implementation=attention, dtype=torch.float32)


@lru_cache(maxsize=16)
def _facts(kind: _Class, seq_len: int) -> ForwardFacts:
    watch = AttentionWatch(seq_len)
    try:
        twin = kind.on_meta(WATCHED)
    except Exception:
        # Families that choose the class of their attention modules by name know only transformers' names.
        twin = kind.on_meta("sdpa")
    return inspect(twin, watch)
