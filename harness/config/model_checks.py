"""Checks of the model's configuration that need no torch: types, divisibility, positions, vocabulary."""

from __future__ import annotations

from typing import Any

from harness.config.errors import InputError
from harness.config.keys import word
from harness.config.model_facts import LLAMA_LIKE, ModelFacts, check_model_type, config_fields, full_config
from harness.config.schema import RunConfig

_COUNTS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "n_embd",
    "n_layer",
    "n_head",
    "n_positions",
    "n_inner",
)


def check(config: RunConfig, shapes: ModelFacts) -> None:
    """Refuse a model that cannot be built, or that the data and the sequence length do not fit.

    Raises:
        InputError: naming the key below model.config, seq_len or data.vocab_size.
    """
    model = config.model
    values = full_config(model)
    kind = str(values["model_type"])
    check_model_type(kind)
    _check_types(kind, model.config)
    _check_heads(kind, values, shapes)
    if shapes.max_positions is not None and config.seq_len > shapes.max_positions:
        name = "n_positions" if "n_positions" in values else "max_position_embeddings"
        reason = f"is longer than the model's {shapes.max_positions} positions"
        fix = f"seq_len={shapes.max_positions}, or model.config.{name}={config.seq_len}"
        raise InputError("seq_len", config.seq_len, reason, fix=fix)
    vocab = shapes.vocab_size
    if config.data.tokenizer == "bpe" and vocab is not None and config.data.vocab_size > vocab:
        reason = f"is larger than the model's vocabulary of {vocab}"
        fix = f"data.vocab_size={vocab}, or model.config.vocab_size={config.data.vocab_size}"
        raise InputError("data.vocab_size", config.data.vocab_size, reason, fix=fix)


def _check_types(kind: str, given: dict[str, Any]) -> None:
    """A value of another type than the field's default, or a count below 1."""
    fields = config_fields(kind) or {}
    for name, value in given.items():
        key, default = f"model.config.{name}", fields.get(name)
        fix = f"{key}={word(default)}" if default is not None else f"remove {key}"
        if name in _COUNTS:
            if value is None and default is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise InputError(key, word(value), allowed="a whole number ≥ 1", fix=fix)
        elif isinstance(default, bool) and not isinstance(value, bool):
            raise InputError(key, word(value), allowed=["true", "false"], fix=fix)
        elif isinstance(default, (int, float)) and not isinstance(default, bool):
            if isinstance(value, (str, bool)):
                raise InputError(key, word(value), allowed="a number", fix=fix)
        elif isinstance(default, str) and not isinstance(value, str):
            raise InputError(key, word(value), allowed="text", fix=fix)


def _check_heads(kind: str, values: dict[str, Any], shapes: ModelFacts) -> None:
    if kind not in (*LLAMA_LIKE, "gpt2") or not shapes.heads or not shapes.hidden_size:
        return
    hidden, heads = shapes.hidden_size, shapes.heads
    name = "n_head" if kind == "gpt2" else "num_attention_heads"
    has_own_width = kind != "llama" and values.get("head_dim") is not None
    if hidden % heads and not has_own_width:
        nearest = min((n for n in range(1, hidden + 1) if hidden % n == 0), key=lambda n: abs(n - heads))
        key = f"model.config.{name}"
        raise InputError(key, heads, f"does not divide the hidden size {hidden}", fix=f"{key}={nearest}")
    width = int(values.get("head_dim") or hidden // heads)
    if kind in LLAMA_LIKE and width % 2:
        reason = f"gives heads of odd width {width}, and rotary positions need an even one"
        raise InputError(
            f"model.config.{name}", heads, reason, fix=f"model.config.{name}={hidden // (width + 1)}"
        )
    groups = values.get("num_key_value_heads")
    if isinstance(groups, int) and heads % groups:
        key = "model.config.num_key_value_heads"
        raise InputError(key, groups, f"does not divide {name} = {heads}", fix=f"{key}={heads}")
