"""Checks of the model's configuration that need no torch: types, divisibility, positions, vocabulary."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from harness.config import model_folder, model_keys
from harness.config.model_facts import LLAMA_LIKE, ModelFacts, facts, full_config
from harness.config.schema import LoraConfig, RunConfig
from harness.config.typed_keys import format_value
from harness.errors import InputError

_OWN_LOSS = re.compile(r"(^|_)(loss|smoothing|mtp|nextn)(_|$)|^(aux_loss_alpha|seq_aux|problem_type)$")
_NO_EFFECT = {
    "dtype": ("does not decide the precision", "precision=bf16_pure (or fp32, bf16, fp16)"),
    "torch_dtype": ("does not decide the precision", "precision=bf16_pure (or fp32, bf16, fp16)"),
    "return_dict": ("would hide the logits from the training loop", None),
    "output_hidden_states": ("would keep activations that nothing reads", None),
    "output_attentions": ("would keep activations that nothing reads", None),
    "architectures": ("does not decide which model is built", "model.model_type=…"),
    "chunk_size_feed_forward": ("does nothing in these models", None),
}


def check(config: RunConfig, shapes: ModelFacts) -> None:
    """Refuse a model that cannot be built, or that the data and the sequence length do not fit.

    Raises:
        InputError: naming the key below model.config, seq_len or data.vocab_size.
    """
    model = config.model
    values = full_config(model)
    kind = str(values["model_type"])
    folder = None if model.path is None else model_folder.read(model.path)
    asked_for = model_keys.canonical(kind, model.config)
    if folder is not None:
        model_folder.weight_files(folder.path)
        _check_code(config, folder)
        model_folder.check_overrides(folder, asked_for)
        asked_for = model_folder.overrides(folder, asked_for)
    else:
        model_keys.check_model_type(kind)
    _check_task(config, kind, values, has_own_code=folder is not None and folder.has_own_code)
    _check_adapter(config)
    _check_own_loss(kind, asked_for, values)
    _check_heads(kind, values, shapes)
    if shapes.max_positions is not None and config.seq_len > shapes.max_positions:
        name = "n_positions" if "n_positions" in values else "max_position_embeddings"
        reason = f"is longer than the model's {shapes.max_positions} positions"
        fix = f"seq_len={shapes.max_positions}, or model.config.{name}={config.seq_len}"
        raise InputError("seq_len", config.seq_len, reason, fix=fix)
    vocab = shapes.vocab_size
    if config.data.tokenizer == "bpe" and vocab is not None and config.data.vocab_size > vocab:
        reason = f"is larger than the model's vocabulary of {vocab}"
        fix = f"data.vocab_size={vocab}"
        if folder is None:
            fix += f", or model.config.vocab_size={config.data.vocab_size}"
        raise InputError("data.vocab_size", config.data.vocab_size, reason, fix=fix)


def _check_task(config: RunConfig, kind: str, values: Mapping[str, Any], *, has_own_code: bool) -> None:
    """Refuse a type that has no head for the task, or an encoder where the next token is predicted."""
    if config.task.name == "classify":
        if not model_keys.classifies(kind) and not has_own_code:
            reason = "has no sequence classifier in the installed transformers"
            allowed = "bert, roberta, distilbert, modernbert, llama, gpt2, qwen3, …"
            raise InputError("model.model_type", kind, reason, allowed=allowed, fix="another model")
    elif model_keys.is_encoder(kind, values):
        reason = "is an encoder: every token sees the tokens that it would have to predict"
        fix = "task=classify, or a decoder such as model=llama_tiny"
        raise InputError("model.model_type", kind, reason, allowed="llama, gpt2, qwen3, …", fix=fix)


def _check_adapter(config: RunConfig) -> None:
    """Refuse keys of an adapter that there is none of, and adapters with weights that they cannot be merged into."""
    model = config.model
    if model.adapter is None and model.lora != (default := LoraConfig()):
        name = next(
            name for name in LoraConfig.model_fields if getattr(model.lora, name) != getattr(default, name)
        )
        key, value = f"model.lora.{name}", format_value(getattr(model.lora, name))
        raise InputError(
            key, value, "has no effect without an adapter", fix=f"model.adapter=lora {key}={value}"
        )


def _check_code(config: RunConfig, folder: model_folder.ModelFolder) -> None:
    """Refuse a folder whose model needs its own Python code, unless ``trust_remote_code=true``."""
    try:
        model_keys.check_model_type(folder.model_type)
    except InputError:
        if not folder.has_own_code:
            raise
        if not config.trust_remote_code:
            reason = f"holds a model of type {folder.model_type}, which needs the Python code in that folder"
            fix = "trust_remote_code=true, if you trust that code"
            raise InputError("model.path", config.model.path, reason, fix=fix) from None


def _check_heads(kind: str, values: dict[str, Any], shapes: ModelFacts) -> None:
    if kind not in (*LLAMA_LIKE, "gpt2") or not shapes.heads or not shapes.hidden_size:
        return
    hidden, heads = shapes.hidden_size, shapes.heads
    name = "n_head" if kind == "gpt2" else "num_attention_heads"
    has_own_width = kind != "llama" and values.get("head_dim") is not None
    if hidden % heads and not has_own_width:
        divisors = (n for gap in range(hidden) for n in (heads - gap, heads + gap))
        nearest = next((n for n in divisors if 1 <= n <= hidden and hidden % n == 0), 1)
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


def _check_own_loss(
    kind: str,
    given: Mapping[str, Any],
    values: Mapping[str, Any],
    *,
    prefix: str = "model.config",
    defaults: Mapping[str, Any] | None = None,
) -> None:
    """Refuse keys that act only inside the model's own loss, which is not what is trained here, or nowhere.

    The load-balancing loss of routers is supported: `output_router_logits` with its coefficient.

    Args:
        kind: model type.
        given: values that were asked for.
        values: the whole configuration.
        prefix: of the keys in messages.
        defaults: of the fields; None: the model type's.

    Raises:
        InputError: naming the key and what to do instead.
    """
    fields = (model_keys.config_fields(kind) or {}) if defaults is None else defaults
    parts = keys.parts if (keys := model_keys.model_keys(kind)) is not None and defaults is None else {}
    for name, value in given.items():
        key, default = f"{prefix}.{name}", fields.get(name)
        if isinstance(value, dict) and (inside := parts.get(name)) is not None:
            inner = {field: inside.fields[field].default for field in inside.fields}
            is_on = {"output_router_logits": values.get("output_router_logits")}
            _check_own_loss(kind, value, {**is_on, **inner, **value}, prefix=key, defaults=inner)
        if name in _NO_EFFECT and value != default:
            reason, instead = _NO_EFFECT[name]
            raise InputError(key, format_value(value), reason, fix=instead or f"remove {key}")
        if name == "output_router_logits" and value and not model_keys.has_router_loss(kind):
            reason = f"has no effect: {kind} computes no load-balancing loss"
            raise InputError(key, format_value(value), reason, fix=f"remove {key}")
        if name in model_keys.ROUTER_COEFFICIENTS:
            if value and value != default and not model_keys.has_router_loss(kind):
                reason = f"has no effect: {kind} computes no load-balancing loss"
                raise InputError(key, format_value(value), reason, fix=f"remove {key}")
            if value and value != default and not values.get("output_router_logits"):
                reason = "has no effect as long as output_router_logits is false"
                fix = f"{prefix}.output_router_logits=true {key}={format_value(value)}"
                raise InputError(key, format_value(value), reason, fix=fix)
        elif _OWN_LOSS.search(name) and value not in (0, None, False, default):
            reason = (
                "acts only inside the model's own loss, and the loss here is cross-entropy of next tokens"
            )
            raise InputError(key, format_value(value), reason, fix=f"remove {key}")


def alignment_warning(config: RunConfig) -> str | None:
    """Return what makes 16-bit matrix products slow on GPUs: sizes that are no multiples of 8; None: nothing.

    cuBLAS and CUTLASS need rows of 16-byte multiples for their fastest tensor-core kernels (NVIDIA, Matrix
    Multiplication Background User's Guide).
    """
    if config.precision == "fp32":
        return None
    shapes = facts(config.model)
    sizes = [
        shapes.hidden_size,
        shapes.vocab_size,
        *(n for shape in (shapes.matrices or {}).values() for n in shape),
    ]
    odd = sorted({size for size in sizes if size and size % 8})
    if not odd:
        return None
    advice = "; to compare speed: model=llama_1b_5464" if config.model.name == "llama_1b" else ""
    return (
        f"sizes of {config.model.name} that are no multiples of 8 ({', '.join(map(str, odd))}) make "
        f"{config.precision} products slow on GPUs{advice}"
    )
