"""Which keys a model type has: one list, read from the source text of the installed `transformers`.

A key of ``model.config`` is accepted if the configuration class declares it, maps it (``attribute_map``), takes it in
its older form, or if the model's code reads it where it is present (``getattr(config, "head_dim", …)``). The class
itself accepts any name and ignores what it does not know, so a mistyped key has to be found here. Nothing is
imported from transformers or torch.
"""

from __future__ import annotations

import ast
import importlib.util
import math
import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from harness.config.typed_keys import format_value
from harness.errors import InputError, closest

BASE_FIELDS = (
    "architectures",
    "dtype",
    "return_dict",
    "output_hidden_states",
    "chunk_size_feed_forward",
)
"""Fields of all configuration classes that a user might try; `model_checks` says what to do instead."""
_ROPE_FIELDS = ("rope_theta", "rope_scaling", "partial_rotary_factor")
"""What every class with ``rope_parameters`` takes in its older form."""
_NOT_KEYS = ("model_type", "torch_dtype", "num_labels", "backbone_kwargs")
"""What constructors take besides keys of the model."""
_OTHER_HEADS = ("SequenceClassification", "TokenClassification", "QuestionAnswering", "MultipleChoice")


class Field(NamedTuple):
    """A declared field: its default (None where that is not a literal) and the names in its annotation."""

    default: Any
    types: frozenset[str]


class ModelKeys(NamedTuple):
    """Keys of one configuration class.

    Attributes:
        fields: declared name → field.
        aliases: other name → declared name.
        older: names that the constructor turns into declared fields.
        computed: names that the class works out itself, so that they can't be given.
        parts: field → keys of the configuration inside it (None: not known).
    """

    fields: dict[str, Field]
    aliases: dict[str, str]
    older: tuple[str, ...]
    computed: frozenset[str]
    parts: dict[str, ModelKeys | None]


@lru_cache(maxsize=64)
def model_keys(model_type: str) -> ModelKeys | None:
    """Return the keys of a model type's configuration class; None if its source cannot be found."""
    path, name = _configuration_file(model_type), _model_types().get(model_type)
    return None if path is None or name is None else _keys_of_class(path, name)


def config_fields(model_type: str) -> dict[str, Any] | None:
    """Return every name that the configuration class takes with its default; None if its source cannot be found.

    Names inside a part (`text_config.hidden_size`) are included with a dot.
    """
    keys = model_keys(model_type)
    if keys is None:
        return None
    fields: dict[str, Any] = dict.fromkeys((*BASE_FIELDS, *keys.aliases, *keys.older))
    fields |= {name: field.default for name, field in keys.fields.items()}
    for part, inside in keys.parts.items():
        if inside is not None:
            fields |= {f"{part}.{name}": field.default for name, field in inside.fields.items()}
            fields |= dict.fromkeys(f"{part}.{name}" for name in (*inside.aliases, *inside.older))
    return fields


@lru_cache(maxsize=64)
def read_fields(model_type: str) -> frozenset[str]:
    """Return the names that the model's code reads from its configuration where they are present.

    Parsing a model takes up to a tenth of a second: ask only about names that `config_fields` lacks.
    """
    path = _configuration_file(model_type)
    names: set[str] = set()
    for source in sorted(path.parent.glob("modeling_*.py")) if path else ():
        tree = ast.parse(source.read_text(encoding="utf-8"))
        # Heads of other tasks read fields that mean nothing to a causal language model.
        tree.body = [
            node
            for node in tree.body
            if not (isinstance(node, ast.ClassDef) and any(head in node.name for head in _OTHER_HEADS))
        ]
        names |= set(_optional_reads(tree))
    return frozenset(name for name in names if not name.startswith("_"))


def has_key(model_type: str, name: str) -> bool:
    """Return True if ``name`` (dotted inside a part) is a key of this model type, or if nothing is known of it."""
    fields, keys = config_fields(model_type), model_keys(model_type)
    if fields is None or keys is None or name in fields:
        return True
    return name not in keys.computed and name in read_fields(model_type)


def has_router_loss(model_type: str) -> bool:
    """Return True if the model's code computes a load-balancing loss of its routers."""
    path = _configuration_file(model_type)
    sources = path.parent.glob("modeling_*.py") if path else ()
    return any("aux_loss = load_balancing_loss_func(" in s.read_text(encoding="utf-8") for s in sources)


def canonical(
    model_type: str, config: Mapping[str, Any], given: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Return a configuration under the declared names, so that one size has one name.

    Args:
        model_type: of the model.
        config: name → value.
        given: the values in it that win over others for the same field (overrides).

    Raises:
        InputError: two names of one field have two values, and neither or both were given.
    """
    keys = model_keys(model_type)
    if keys is None:
        return dict(config)
    given = given or {}
    renamed: dict[str, Any] = {}
    origin: dict[str, str] = {}
    for name, value in config.items():
        field = keys.aliases.get(name, name)
        other = origin.get(field)
        if other is not None and renamed[field] != value:
            if (name in given) == (other in given):
                both, key = f"{renamed[field]} and {value}", f"model.config.{field}"
                reason = f"are two values for one key (model.config.{other} is model.config.{name})"
                raise InputError(key, both, reason, fix=f"give {key} alone")
            if other in given:
                continue
        renamed[field], origin[field] = value, name
    return renamed


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


def is_encoder(model_type: str, config: Mapping[str, Any] | None = None) -> bool:
    """Return True if every token sees the whole row: a type that predicts masked tokens, unless ``is_decoder`` is set.

    Args:
        model_type: of the model.
        config: its configuration values.
    """
    if config is not None and config.get("is_decoder"):
        return False
    return model_type in _head_tables().get("MODEL_FOR_MASKED_LM_MAPPING_NAMES", ())


def classifies(model_type: str) -> bool:
    """Return True if `transformers` has a sequence classifier of this model type, or if its tables are not found."""
    table = _head_tables().get("MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES")
    return table is None or model_type in table


@lru_cache(maxsize=1)
def _head_tables() -> dict[str, frozenset[str]]:
    """Return the model types in each ``MODEL_FOR_…_MAPPING_NAMES`` table of `transformers`, from its source text."""
    folder = _transformers()
    path = folder / "models" / "auto" / "modeling_auto.py" if folder else None
    if path is None or not path.is_file():
        return {}
    # By pattern: parsing a file of two thousand lines takes longer than all other checks.
    tables = re.findall(
        r"^(MODEL_FOR_\w+_MAPPING_NAMES) = OrderedDict\(\n(.*?)^\)", path.read_text("utf-8"), re.M | re.S
    )
    return {name: frozenset(re.findall(r'^\s*\(\s*"([\w.-]+)",', body, re.M)) for name, body in tables}


def _configuration_file(model_type: str) -> Path | None:
    folder, name = _transformers(), _model_types().get(model_type)
    if folder is None or name is None:
        return None
    module = _special_modules().get(model_type, model_type.replace("-", "_"))
    path = folder / "models" / module / f"configuration_{module}.py"
    if path.is_file():
        return path
    # A few types share the class of another one, or have a file of another name.
    candidates = sorted((folder / "models").glob("*/configuration_*.py"))
    return next((p for p in candidates if f"\nclass {name}(" in p.read_text(encoding="utf-8")), None)


def _keys_of_class(path: Path, name: str, depth: int = 0) -> ModelKeys | None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    by_name = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    if name not in by_name:
        return None
    fields: dict[str, Field] = {}
    mapping: dict[str, str] = {}
    older: dict[str, None] = {}
    computed: set[str] = set()
    parts: dict[str, ModelKeys | None] = {}
    for node in [*_parents(by_name[name], by_name), by_name[name]]:
        for statement in node.body:
            fields |= _declared(statement)
            older |= dict.fromkeys(_taken_from_kwargs(statement))
            computed |= set(_computed(statement))
            target = ast.unparse(statement.targets[0]) if isinstance(statement, ast.Assign) else ""
            if isinstance(statement, ast.Assign) and target == "attribute_map":
                mapping |= _literal(statement.value) or {}
            elif isinstance(statement, ast.Assign) and target in ("sub_configs", "sub_configs_defaults"):
                for part, spec in _parts(statement.value):
                    parts[part] = None if depth else _keys_of_part(path, spec)
    if "rope_parameters" in fields:
        older |= dict.fromkeys(_ROPE_FIELDS)
    # `attribute_map` may point from a declared field to a name that is none.
    aliases = {a: b for a, b in mapping.items() if a not in fields}
    aliases |= {b: a for a, b in mapping.items() if a in fields and b not in fields}
    older = {name: None for name in older if name not in (*fields, *_NOT_KEYS)}
    return ModelKeys(fields, aliases, tuple(older), frozenset(computed - set(fields) - set(older)), parts)


def _keys_of_part(path: Path, spec: ast.expr) -> ModelKeys | None:
    """Return the keys of a part that names a class of the same file, or a model type (`SubConfigSpec(…)`)."""
    if isinstance(spec, ast.Name):
        return _keys_of_class(path, spec.id, depth=1)
    if isinstance(spec, ast.Call):
        keywords = {keyword.arg: keyword.value for keyword in spec.keywords}
        model_type = _literal(keywords.get("model_type"))
        if isinstance(model_type, str):
            file, name = _configuration_file(model_type), _model_types().get(model_type)
            return None if file is None or name is None else _keys_of_class(file, name, depth=1)
        if isinstance(keywords.get("config_class"), ast.Name):
            return _keys_of_part(path, keywords["config_class"])
    return None


def _parts(node: ast.expr) -> Iterator[tuple[str, ast.expr]]:
    if isinstance(node, ast.Dict):
        for key, value in zip(node.keys, node.values):
            if isinstance(key, ast.Constant) and isinstance(key.value, str):
                yield key.value, value


def _declared(statement: ast.stmt) -> dict[str, Field]:
    if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
        annotation = ast.unparse(statement.annotation)
        if "ClassVar" in annotation:
            return {}
        names = {node.id for node in ast.walk(statement.annotation) if isinstance(node, ast.Name)}
        names |= {"None"} if "None" in annotation else set()
        return {statement.target.id: Field(_literal(statement.value), frozenset(names))}
    if isinstance(statement, ast.FunctionDef) and statement.name == "__init__":
        arguments = statement.args.args[1:]
        gap = len(arguments) - len(statement.args.defaults)
        defaults = [None] * gap + list(statement.args.defaults)
        return {a.arg: Field(_literal(d), frozenset()) for a, d in zip(arguments, defaults)}
    return {}


def _taken_from_kwargs(statement: ast.stmt) -> Iterator[str]:
    """Yield the names in ``kwargs.pop("name", …)`` of the constructor."""
    if isinstance(statement, ast.FunctionDef) and statement.name == "__post_init__":
        for node in ast.walk(statement):
            is_taken = isinstance(node, ast.Call) and ast.unparse(node.func) in ("kwargs.pop", "kwargs.get")
            if is_taken and node.args and isinstance(name := _literal(node.args[0]), str):  # pyright: ignore[reportAttributeAccessIssue]
                yield name


def _computed(statement: ast.stmt) -> Iterator[str]:
    """Yield properties, and attributes that the constructor sets."""
    if isinstance(statement, ast.FunctionDef):
        if any(ast.unparse(decorator) == "property" for decorator in statement.decorator_list):
            yield statement.name
        for node in ast.walk(statement) if statement.name == "__post_init__" else ():
            target = node.targets[0] if isinstance(node, ast.Assign) else None
            if isinstance(target, ast.Attribute) and ast.unparse(target.value) == "self":
                yield target.attr


def _optional_reads(tree: ast.AST) -> Iterator[str]:
    """Yield the names in ``getattr(….config, "name", …)`` and ``hasattr(…)``."""
    for node in ast.walk(tree):
        is_read = isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        if is_read and node.func.id in ("getattr", "hasattr") and len(node.args) > 1:  # pyright: ignore[reportAttributeAccessIssue]
            owner, name = ast.unparse(node.args[0]), _literal(node.args[1])  # pyright: ignore[reportAttributeAccessIssue]
            if owner.endswith("config") and isinstance(name, str):
                yield name


@lru_cache(maxsize=1)
def _transformers() -> Path | None:
    spec = importlib.util.find_spec("transformers")
    return Path(spec.origin).parent if spec and spec.origin else None


@lru_cache(maxsize=1)
def _mappings() -> dict[str, dict[str, str]]:
    """Return the `NAME = OrderedDict([(a, b), …])` tables of transformers' automatic mappings."""
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
                    texts = [item.value for item in pair.elts if isinstance(item, ast.Constant)]
                    if len(texts) == 2 and all(isinstance(item, str) for item in texts):
                        table[str(texts[0])] = str(texts[1])
    return tables


def _model_types() -> dict[str, str]:
    return _mappings().get("CONFIG_MAPPING_NAMES", {})


def _special_modules() -> dict[str, str]:
    return _mappings().get("SPECIAL_MODEL_TYPE_TO_MODULE_NAME", {})


def _parents(node: ast.ClassDef, by_name: dict[str, ast.ClassDef]) -> list[ast.ClassDef]:
    parents = [by_name[base.id] for base in node.bases if isinstance(base, ast.Name) and base.id in by_name]
    return [grand for parent in parents for grand in [*_parents(parent, by_name), parent]]


def _literal(node: ast.expr | None) -> Any:
    """Return the value of a literal; for `interval(…)(default=0.02)` that default."""
    if isinstance(node, ast.Call):
        return next((_literal(keyword.value) for keyword in node.keywords if keyword.arg == "default"), None)
    try:
        return ast.literal_eval(node) if node is not None else None
    except ValueError:
        return None


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


def check_values(kind: str, given: Mapping[str, Any], *, prefix: str = "model.config") -> None:
    """Refuse a value of another type than its field, a size that no model has, and what is not a number.

    Args:
        kind: model type.
        given: configuration values, under any of their names.
        prefix: of the keys in messages.

    Raises:
        InputError: naming the key, what is allowed and what to type.
    """
    keys = model_keys(kind)
    _check_fields(keys, given, prefix)
    for part, inside in (keys.parts if keys is not None else {}).items():
        if inside is not None and isinstance(given.get(part), dict):
            _check_fields(inside, given[part], f"{prefix}.{part}")


def shortened(value: Any) -> str:
    """Return a value as it is typed, cut where that would fill the screen."""
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10**18:
        return f"a number of {len(str(abs(value))):,} digits"
    text = format_value(value)
    return text if len(text) <= 60 else f"{text[:57]}…"


def _check_fields(keys: ModelKeys | None, given: Mapping[str, Any], prefix: str) -> None:
    fields = keys.fields if keys is not None else {}
    aliases = keys.aliases if keys is not None else {}
    for name, value in given.items():
        field = fields.get(aliases.get(name, name), Field(None, frozenset()))
        key, default = f"{prefix}.{name}", field.default
        fix = f"{key}={format_value(default)}" if default is not None else f"remove {key}"
        allowed = _wrong(name, value, field)
        if allowed is not None:
            raise InputError(key, shortened(value), allowed=allowed, fix=fix)


def _wrong(name: str, value: Any, field: Field) -> str | list[str] | None:
    """Return what is allowed if a value is wrong, else None."""
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


def _is_plain(field: Field) -> bool:
    """Return True if the annotation names types, and all of them are known here."""
    plain = {"int", "float", "bool", "str", "None", "list", "tuple", "dict", "Any"}
    return bool(field.types) and field.types <= plain and "Any" not in field.types


def _phrase(field: Field) -> str | list[str]:
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
