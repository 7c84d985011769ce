"""What a model's configuration says about its shapes, without importing torch or transformers.

Fields and defaults of the `transformers` configuration classes are read from their source text, so a mistyped
`model.config.hiden_size` (which transformers would accept and ignore) is found before anything is imported.
"""

from __future__ import annotations

import ast
import importlib.util
import json
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from harness.config.errors import InputError, closest
from harness.config.schema import ModelConfig

LLAMA_LIKE = ("llama", "mistral", "qwen2", "qwen3")
_BASE_FIELDS = ("architectures", "dtype", "return_dict", "output_hidden_states", "chunk_size_feed_forward")


class ModelFacts(NamedTuple):
    """Shapes of a causal language model; None where this family is not known here.

    Attributes:
        hidden_size, layers, heads, vocab_size, max_positions: as configured.
        matrices: hidden matrices, name → (rows, columns) as the weight is stored, of the first layer
            (all layers are alike).
        parameters: number of parameters, exact.
    """

    hidden_size: int | None
    layers: int | None
    heads: int | None
    vocab_size: int | None
    max_positions: int | None
    matrices: dict[str, tuple[int, int]] | None
    parameters: int | None


@lru_cache(maxsize=32)
def config_fields(model_type: str) -> dict[str, Any] | None:
    """Arguments of a model type's configuration class with their defaults (None where not a literal).

    Returns:
        field → default, aliases of `attribute_map` included; None if the source cannot be found.
    """
    folder = _transformers()
    if folder is None:
        return None
    module = _special_modules().get(model_type, model_type.replace("-", "_"))
    path = folder / "models" / module / f"configuration_{module}.py"
    if not path.is_file():
        return None
    wanted = _model_types().get(model_type)
    classes = [
        node for node in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(node, ast.ClassDef)
    ]
    chosen = next((node for node in classes if node.name == wanted), None)
    if chosen is None:
        return None
    by_name = {node.name: node for node in classes}
    fields: dict[str, Any] = dict.fromkeys(_BASE_FIELDS)
    for node in [*_parents(chosen, by_name), chosen]:
        fields |= _class_fields(node)
    return fields


def check_model_type(model_type: str) -> None:
    """Refuse a model type that the installed transformers does not know.

    Raises:
        InputError: with the closest known type.
    """
    known = _model_types()
    if known and model_type not in known:
        guess = closest(model_type, known)
        raise InputError(
            "model.model_type",
            model_type,
            "is not a model type of the installed transformers",
            suggestion=guess,
            allowed="llama, gpt2, qwen3, mistral, phi3, … (any causal language model of transformers)",
            fix=f"model.model_type={guess or 'llama'}",
        )


def facts(model: ModelConfig) -> ModelFacts:
    """Shapes of the model that this configuration describes.

    Raises:
        InputError: `model.path` is not a folder with a config.json.
    """
    values = full_config(model)
    kind = values.pop("model_type", model.model_type)

    def number(*names: str) -> int | None:
        found = next((values[name] for name in names if values.get(name) is not None), None)
        return found if isinstance(found, int) and not isinstance(found, bool) else None

    hidden, layers = number("hidden_size", "n_embd", "d_model"), number("num_hidden_layers", "n_layer")
    heads, vocab = number("num_attention_heads", "n_head"), number("vocab_size")
    positions = number("max_position_embeddings", "n_positions")
    matrices, parameters = None, None
    if None not in (hidden, layers, heads, vocab) and hidden and layers and heads and vocab:
        if kind in LLAMA_LIKE:
            matrices, parameters = _llama(str(kind), values, hidden, layers, heads, vocab)
        elif kind == "gpt2":
            matrices, parameters = _gpt2(values, hidden, layers, vocab, positions or 1024)
    return ModelFacts(hidden, layers, heads, vocab, positions, matrices, parameters)


def full_config(model: ModelConfig) -> dict[str, Any]:
    """The model's configuration values: class defaults, then `model.path`'s config.json, then `model.config`.

    Raises:
        InputError: `model.path` is not a folder with a readable config.json.
    """
    kind, stored = model.model_type, {}
    if model.path is not None:
        stored = _stored_config(model.path)
        kind = str(stored.get("model_type", kind))
    defaults = config_fields(kind) or {}
    known_pairs = [pair for pair in _ALIASES if pair[0] in defaults and pair[1] in defaults]
    merged = {**defaults, **stored, **model.config, "model_type": kind}
    for left, right in known_pairs:
        # An alias that was given wins over the other name's default.
        given = {**stored, **model.config}
        if left in given and right not in given:
            merged[right] = merged[left]
        elif right in given and left not in given:
            merged[left] = merged[right]
    return merged


_ALIASES = (
    ("hidden_size", "n_embd"),
    ("num_hidden_layers", "n_layer"),
    ("num_attention_heads", "n_head"),
    ("max_position_embeddings", "n_positions"),
)


def _stored_config(path: str) -> dict[str, Any]:
    file = Path(path).expanduser() / "config.json"
    fix = "give a folder that save_pretrained wrote, or leave model.path out"
    if not file.parent.is_dir():
        raise InputError("model.path", path, "is not a folder", fix=fix)
    if not file.is_file():
        raise InputError("model.path", path, "has no config.json", fix=fix)
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError("model.path", path, f"has an unreadable config.json ({error})", fix=fix) from None
    if not isinstance(stored, dict) or "model_type" not in stored:
        raise InputError("model.path", path, "has a config.json without model_type", fix=fix)
    return stored


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


@lru_cache(maxsize=1)
def _transformers() -> Path | None:
    spec = importlib.util.find_spec("transformers")
    return Path(spec.origin).parent if spec and spec.origin else None


@lru_cache(maxsize=1)
def _mappings() -> dict[str, dict[str, str]]:
    """The `NAME = OrderedDict([(a, b), …])` tables of transformers' automatic mappings."""
    folder = _transformers()
    tables: dict[str, dict[str, str]] = {}
    for name in ("auto_mappings.py", "configuration_auto.py"):
        path = folder / "models" / "auto" / name if folder else None
        if path is None or not path.is_file():
            continue
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                table = tables.setdefault(node.targets[0].id, {})
                for pair in (part for part in ast.walk(node.value) if isinstance(part, ast.Tuple)):
                    words = [item.value for item in pair.elts if isinstance(item, ast.Constant)]
                    if len(words) == 2 and all(isinstance(item, str) for item in words):
                        table[str(words[0])] = str(words[1])
    return tables


def _model_types() -> dict[str, str]:
    return _mappings().get("CONFIG_MAPPING_NAMES", {})


def _special_modules() -> dict[str, str]:
    return _mappings().get("SPECIAL_MODEL_TYPE_TO_MODULE_NAME", {})


def _parents(node: ast.ClassDef, by_name: dict[str, ast.ClassDef]) -> list[ast.ClassDef]:
    parents = [by_name[base.id] for base in node.bases if isinstance(base, ast.Name) and base.id in by_name]
    return [grand for parent in parents for grand in [*_parents(parent, by_name), parent]]


def _class_fields(node: ast.ClassDef) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for statement in node.body:
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            if "ClassVar" not in ast.unparse(statement.annotation):
                fields[statement.target.id] = _literal(statement.value)
        elif isinstance(statement, ast.FunctionDef) and statement.name == "__init__":
            arguments = statement.args.args[1:]
            gap = len(arguments) - len(statement.args.defaults)
            for position, argument in enumerate(arguments):
                default = statement.args.defaults[position - gap] if position >= gap else None
                fields[argument.arg] = _literal(default)
        elif isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == "attribute_map":
            fields |= dict.fromkeys(_literal(statement.value) or ())
    return fields


def _literal(node: ast.expr | None) -> Any:
    """The value of a literal; for `interval(…)(default=0.02)` that default."""
    if isinstance(node, ast.Call):
        return next((_literal(word.value) for word in node.keywords if word.arg == "default"), None)
    try:
        return ast.literal_eval(node) if node is not None else None
    except ValueError:
        return None
