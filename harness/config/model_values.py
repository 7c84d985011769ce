"""Values of `model.config`: their types and sizes, and keys that would do nothing in a training run. No torch."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from harness.config import model_keys
from harness.config.typed_keys import format_value
from harness.errors import InputError

LARGEST = 1 << 24
"""Of every size and count; the longest context of a published model is 10 M positions."""
MOST_LAYERS = 1024
ROUTER_COEFFICIENTS = ("router_aux_loss_coef", "aux_loss_coef", "moe_loss_weight")
"""Names that `transformers` configurations give to the coefficient of the load-balancing loss."""

_COUNTS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "moe_intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "num_experts",
    "num_local_experts",
    "num_experts_per_tok",
    "n_embd",
    "n_head",
    "n_positions",
    "n_inner",
    "d_model",
    "n_heads",
    "num_heads",
)
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_SIZE = re.compile(
    r"(^|_)(size|dim|heads?|layers?|experts|positions?|embd|inner|rank|groups?|len|window|tok)$"
)
_LIMITED = re.compile(r"(pdrop|dropout|_eps|epsilon|initializer_range|_loss_coef)$")

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


def check(kind: str, given: Mapping[str, Any], *, prefix: str = "model.config") -> None:
    """Refuse a value of another type than its field, a size that no model has, and what is not a number.

    Args:
        kind: model type.
        given: configuration values, under any of their names.
        prefix: of the keys in messages.

    Raises:
        InputError: naming the key, what is allowed and what to type.
    """
    keys = model_keys.model_keys(kind)
    _check_fields(keys, given, prefix)
    for part, inside in (keys.parts if keys is not None else {}).items():
        if inside is not None and isinstance(given.get(part), dict):
            _check_fields(inside, given[part], f"{prefix}.{part}")


def check_own_loss(
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
        given: values that somebody asked for.
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
            check_own_loss(kind, value, {**is_on, **inner, **value}, prefix=key, defaults=inner)
        if name in _NO_EFFECT and value != default:
            reason, instead = _NO_EFFECT[name]
            raise InputError(key, format_value(value), reason, fix=instead or f"remove {key}")
        if name == "output_router_logits" and value and not model_keys.has_router_loss(kind):
            reason = f"has no effect: {kind} computes no load-balancing loss"
            raise InputError(key, format_value(value), reason, fix=f"remove {key}")
        if name in ROUTER_COEFFICIENTS:
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


def shown(value: Any) -> str:
    """Return a value as it is typed, cut where that would fill the screen."""
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10**18:
        return f"a number of {len(str(abs(value))):,} digits"
    text = format_value(value)
    return text if len(text) <= 60 else f"{text[:57]}…"


def _check_fields(keys: model_keys.ModelKeys | None, given: Mapping[str, Any], prefix: str) -> None:
    fields = keys.fields if keys is not None else {}
    aliases = keys.aliases if keys is not None else {}
    for name, value in given.items():
        field = fields.get(aliases.get(name, name), model_keys.Field(None, frozenset()))
        key, default = f"{prefix}.{name}", field.default
        fix = f"{key}={format_value(default)}" if default is not None else f"remove {key}"
        allowed = _wrong(name, value, field)
        if allowed is not None:
            raise InputError(key, shown(value), allowed=allowed, fix=fix)


def _wrong(name: str, value: Any, field: model_keys.Field) -> str | list[str] | None:
    """What is allowed, where a value is not; None where it is."""
    types, default = field.types, field.default
    if name in _LAYERS:
        return None if _is_count(value, MOST_LAYERS) else f"a whole number ≥ 1 and at most {MOST_LAYERS:,}"
    if name in _COUNTS:
        is_free = value is None and (default is None or "None" in types)
        return None if is_free or _is_count(value, LARGEST) else f"a whole number ≥ 1 and at most {LARGEST:,}"
    if value is None:
        return None if "None" in types or default is None else _phrase(field)
    if isinstance(value, bool):
        return None if "bool" in types or not _is_plain(field) else _phrase(field)
    if isinstance(value, int):
        if abs(value) > (LARGEST if _SIZE.search(name) else 2**53):
            return f"at most {LARGEST:,}" if _SIZE.search(name) else "a number of at most 15 digits"
        if not types & {"int", "float"} and _is_plain(field):
            return _phrase(field)
    if isinstance(value, float) and (not math.isfinite(value) or ("float" not in types and _is_plain(field))):
        return _phrase(field)
    if isinstance(value, (int, float)) and _LIMITED.search(name):
        is_share = name.endswith(("pdrop", "dropout"))
        if value < 0 or (is_share and value > 1):
            return "a number from 0 to 1" if is_share else "a number ≥ 0"
    if isinstance(value, str) and "str" not in types and _is_plain(field):
        return _phrase(field)
    if isinstance(value, (list, dict)) and _is_plain(field) and not types & {"list", "tuple", "dict"}:
        return _phrase(field)
    return None


def _is_count(value: Any, largest: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= largest


def _is_plain(field: model_keys.Field) -> bool:
    """Whether all types that the annotation names are known here (one without annotation names none)."""
    plain = {"int", "float", "bool", "str", "None", "list", "tuple", "dict", "Any"}
    return bool(field.types) and field.types <= plain and "Any" not in field.types


def _phrase(field: model_keys.Field) -> str | list[str]:
    types = field.types
    if types <= {"bool", "None"} and "bool" in types:
        return ["true", "false", *(["null"] if "None" in types else [])]
    phrases = {
        "float": "a number",
        "int": "a whole number",
        "str": "text",
        "bool": "true or false",
        "list": "a list",
        "dict": "a mapping",
        "None": "null",
    }
    names = [name for name in phrases if name in types and not (name == "int" and "float" in types)]
    return " or ".join(phrases[name] for name in names) or "a value of the field's type"
