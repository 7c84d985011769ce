"""What a model's configuration says about its shapes, without importing torch or transformers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from harness.config import model_folder
from harness.config.model_keys import ROUTER_COEFFICIENTS, canonical, check_values, is_encoder, model_keys
from harness.config.schema import LoraConfig, ModelConfig

LLAMA_LIKE = ("llama", "mistral", "qwen2", "qwen3")
_PADDED_POSITIONS = (
    "roberta",
    "xlm-roberta",
    "camembert",
    "roberta-prelayernorm",
    "data2vec-text",
    "xlm-roberta-xl",
)
"""Encoders that count positions from their padding token."""
_NAMES = {
    "hidden_size": ("hidden_size", "n_embd", "d_model", "dim"),
    "layers": ("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
    "heads": ("num_attention_heads", "n_head", "n_heads", "num_heads"),
    "vocab_size": ("vocab_size",),
    "positions": ("max_position_embeddings", "n_positions", "max_seq_len"),
}
"""Size → the declared names that it has in the families of transformers."""


class ModelFacts(NamedTuple):
    """Shapes of a causal language model; None where this family is not known here.

    Attributes:
        hidden_size, layers, heads, vocab_size, max_positions: as configured.
        matrices: hidden matrices, name → (rows, columns) as the weight is stored, of the first layer
            (all layers are alike).
        parameters: number of parameters: exact, or what the weight files of `model.path` hold.
        head_dim: rows of a head in the projections to Q, K and V.
        lora: the adapter, if there is one: then its matrices are trained, and none of ``matrices``.
    """

    hidden_size: int | None
    layers: int | None
    heads: int | None
    vocab_size: int | None
    max_positions: int | None
    matrices: dict[str, tuple[int, int]] | None
    parameters: int | None
    head_dim: int | None = None
    lora: LoraConfig | None = None

    def for_rule(self, options: Mapping[str, Any]) -> ModelFacts:
        """Return the facts with the matrices that a rule sees.

        They are the adapter's where there is one, those of `matrix_modules`, and by `split_heads` each head of Q, K, V.
        """
        if self.lora is not None:
            # Its two matrices have no heads.
            return self._replace(matrices=self.trained, head_dim=None, lora=None).for_rule(options)
        patterns = options.get("matrix_modules")
        if patterns is not None and self.matrices is not None:
            from optimizers.module_patterns import first_match

            chosen = {
                n: shape for n, shape in self.matrices.items() if first_match(n.split(" ")[0], patterns)
            }
            # Without any, the model itself says so, with the names of all of its layers.
            return self._replace(matrices=chosen).for_rule({**options, "matrix_modules": None})
        if not options.get("split_heads") or self.matrices is None or self.head_dim is None:
            return self
        matrices: dict[str, tuple[int, int]] = {}
        for name, (rows, columns) in self.matrices.items():
            leaf, is_fused = name.split(" ")[0].split(".")[-2], "c_attn" in name
            if leaf not in ("q_proj", "k_proj", "v_proj") and not is_fused:
                matrices[name] = rows, columns
                continue
            # GPT-2 stores the output along the columns.
            length = columns if is_fused else rows
            shape = (rows, self.head_dim) if is_fused else (self.head_dim, columns)
            matrices |= {f"{name}[h{head}]": shape for head in range(length // self.head_dim)}
        return self._replace(matrices=matrices)

    @property
    def trained(self) -> dict[str, tuple[int, int]] | None:
        """Return the hidden matrices of the first layer that are trained: with an adapter, its own."""
        if self.lora is None or self.matrices is None:
            return self.matrices
        from optimizers.module_patterns import first_match

        adapters: dict[str, tuple[int, int]] = {}
        for name, (rows, columns) in self.matrices.items():
            weight, _, part = name.partition(" ")
            module = weight.removesuffix(".weight")
            if self.lora.targets is not None and first_match(module, self.lora.targets) is None:
                continue
            # GPT-2 stores the output along the columns, and its three projections in one.
            out, inputs = (columns, rows) if weight.startswith("transformer.") else (rows, columns)
            adapters[f"{module}.lora_A.default.weight"] = self.lora.rank, inputs
            adapters[f"{module}.lora_B.default.weight"] = out * (3 if part else 1), self.lora.rank
        return adapters


def facts(model: ModelConfig) -> ModelFacts:
    """Return the shapes of the model that this configuration describes.

    Raises:
        InputError: `model.path` is not a model folder, or a value is of the wrong type or size.
    """
    values = full_config(model)
    kind = str(values.pop("model_type", model.model_type))
    check_values(kind, model.config)
    text = _text(kind, values)

    def number(size: str) -> int | None:
        found = next((text[name] for name in _NAMES[size] if text.get(name) is not None), None)
        return found if isinstance(found, int) and not isinstance(found, bool) else None

    hidden, layers, heads, vocab = (number(size) for size in ("hidden_size", "layers", "heads", "vocab_size"))
    positions = number("positions")
    matrices, parameters = None, None
    if hidden and layers and heads and vocab:
        if kind in LLAMA_LIKE:
            matrices, parameters = _llama(kind, text, hidden, layers, heads, vocab)
        elif kind == "gpt2":
            matrices, parameters = _gpt2(text, hidden, layers, vocab, positions or 1024)
    if parameters is None and model.path is not None:
        parameters = model_folder.read(model.path).parameters()
    stated = text.get("head_dim")
    head_dim = stated if isinstance(stated, int) else hidden // heads if hidden and heads else None
    if positions is not None and kind in _PADDED_POSITIONS:
        # Positions are counted from the padding token, whose own place and those before it are left out.
        positions -= int(text.get("pad_token_id") or 0) + 1
    lora = model.lora if model.adapter == "lora" else None
    return ModelFacts(hidden, layers, heads, vocab, positions, matrices, parameters, head_dim, lora)


def parameter_count(model: ModelConfig) -> int:
    """Count the parameters of the model: exact for LLaMA-like and GPT-2, else 12·layers·hidden² + 2·vocab·hidden.

    An encoder's embedding counts once, because its classifier has no output for each token.
    """
    shapes = facts(model)
    if shapes.parameters is not None:
        return shapes.parameters
    hidden, layers, vocab = shapes.hidden_size or 0, shapes.layers or 0, shapes.vocab_size or 0
    tables = 1 if is_encoder(model.model_type) else 2
    return 12 * layers * hidden**2 + tables * vocab * hidden


def trained_parameters(model: ModelConfig) -> int:
    """Return the number of parameters that are trained: all, or an adapter's (without the head of a classifier).

    The adapter is exact for LLaMA-like and GPT-2, else counted as six square matrices a layer.
    """
    if model.adapter is None:
        return parameter_count(model)
    shapes = facts(model)
    layers, hidden = shapes.layers or 0, shapes.hidden_size or 0
    matrices = shapes.trained
    if matrices is None:
        return layers * 6 * 2 * hidden * model.lora.rank
    return layers * sum(rows * columns for rows, columns in matrices.values())


def full_config(model: ModelConfig) -> dict[str, Any]:
    """Return a model's configuration under declared names: class defaults, `model.path`'s, then `model.config`.

    Raises:
        InputError: `model.path` is not a model folder.
    """
    kind, stored = model.model_type, {}
    if model.path is not None:
        folder = model_folder.read(model.path)
        kind, stored = folder.model_type, folder.settings()
    known = model_keys(kind)
    defaults = {} if known is None else {name: field.default for name, field in known.fields.items()}
    return {**defaults, **stored, **canonical(kind, model.config), "model_type": kind}


def router_coefficient(model: ModelConfig) -> float:
    """Return the coefficient of the routers' load-balancing loss; 0.0 where none is computed.

    Args:
        model: as composed: ``config`` holds what `model.path` says, too.
    """
    values = full_config(model.model_copy(update={"path": None}))
    text = _text(model.model_type, values)
    if not (values.get("output_router_logits") or text.get("output_router_logits")):
        return 0.0
    # Of a family that names it otherwise, all that is known here is that there is one.
    return float(next((text[name] for name in ROUTER_COEFFICIENTS if text.get(name) is not None), 1.0))


def _text(kind: str, values: dict[str, Any]) -> dict[str, Any]:
    """Return the language model's part of a configuration: all of it, or `text_config` of a multimodal model."""
    known = model_keys(kind)
    part = known.parts.get("text_config") if known is not None else None
    if part is None:
        return values
    given = values.get("text_config")
    defaults = {name: field.default for name, field in part.fields.items()}
    return {**values, **defaults, **(given if isinstance(given, dict) else {})}


def _llama(
    kind: str, values: dict[str, Any], hidden: int, layers: int, heads: int, vocab: int
) -> tuple[dict[str, tuple[int, int]], int]:
    inner = int(values.get("intermediate_size") or 0)
    head_dim = int(values.get("head_dim") or hidden // heads)
    groups = int(values.get("num_key_value_heads") or heads) if "num_key_value_heads" in values else heads
    queries, shared = heads * head_dim, groups * head_dim
    prefix = "model.layers.0."
    matrices = {
        f"{prefix}self_attn.q_proj.weight": (queries, hidden),
        f"{prefix}self_attn.k_proj.weight": (shared, hidden),
        f"{prefix}self_attn.v_proj.weight": (shared, hidden),
        f"{prefix}self_attn.o_proj.weight": (hidden, queries),
        f"{prefix}mlp.gate_proj.weight": (inner, hidden),
        f"{prefix}mlp.up_proj.weight": (inner, hidden),
        f"{prefix}mlp.down_proj.weight": (hidden, inner),
    }
    per_layer = sum(rows * columns for rows, columns in matrices.values()) + 2 * hidden
    if kind == "qwen2":
        per_layer += queries + 2 * shared
    elif values.get("attention_bias"):
        per_layer += queries + 2 * shared + hidden
    if values.get("mlp_bias"):
        per_layer += 2 * inner + hidden
    if kind == "qwen3":
        per_layer += 2 * head_dim
    embeddings = vocab * hidden * (1 if values.get("tie_word_embeddings") else 2)
    return matrices, embeddings + layers * per_layer + hidden


def _gpt2(
    values: dict[str, Any], hidden: int, layers: int, vocab: int, positions: int
) -> tuple[dict[str, tuple[int, int]], int]:
    inner = int(values.get("n_inner") or 4 * hidden)
    prefix = "transformer.h.0."
    matrices = {
        f"{prefix}attn.c_attn.weight (one of q, k, v)": (hidden, hidden),
        f"{prefix}attn.c_proj.weight": (hidden, hidden),
        f"{prefix}mlp.c_fc.weight": (hidden, inner),
        f"{prefix}mlp.c_proj.weight": (inner, hidden),
    }
    attention = 4 * hidden * hidden + 4 * hidden
    feed_forward = 2 * hidden * inner + inner + hidden
    embeddings = vocab * hidden * (1 if values.get("tie_word_embeddings", True) else 2) + positions * hidden
    return matrices, embeddings + layers * (attention + feed_forward + 4 * hidden) + 2 * hidden
