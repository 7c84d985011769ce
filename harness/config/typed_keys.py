"""The base of all typed keys: fields with defaults, bounds and meaning, and the error that a wrong key or value gets.

A schema is a pydantic model below `TypedKeys` whose fields have a docstring. From it come the list of keys for
``--help`` and `optbench show`, the check of values, and one-line errors that say what to type.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel, ConfigDict, ValidationError, create_model
from pydantic.fields import FieldInfo

from harness.config import suggestions
from harness.errors import InputError, closest

FREE = "model.config"
"""Key whose inner keys are those of another library; `unknown` does not suggest them for other keys."""


class TypedKeys(BaseModel):
    """Base of every schema: unknown keys are errors, defaults are validated, a field's docstring is its meaning."""

    model_config = ConfigDict(
        extra="forbid", validate_default=True, use_attribute_docstrings=True, allow_inf_nan=False
    )


Schema = TypeVar("Schema", bound=TypedKeys)


class Key(NamedTuple):
    """One documented key.

    Attributes:
        name: dotted key.
        allowed: accepted values: a list of choices, or one sentence.
        default: value without any file or override.
        doc: meaning.
        is_text, is_number, is_list: how an unquoted value is to be understood.
        field: of the schema.
    """

    name: str
    allowed: list[str] | str
    default: Any
    doc: str
    is_text: bool
    is_number: bool
    is_list: bool
    field: FieldInfo

    def accepts(self, text: str) -> bool:
        """Return True if the schema takes a value that is typed like this."""
        value: Any = {"null": None, "true": True, "false": False}.get(text, text)
        if self.is_number and isinstance(value, bool):
            return False
        try:
            kind: Any = self.field.annotation
            create_model("Value", value=(kind, self.field)).model_validate({"value": value})
        except (ValidationError, ValueError):
            return False
        return True


@lru_cache(maxsize=32)
def keys_of(schema: type[TypedKeys]) -> Mapping[str, Key]:
    """Return the keys of a schema by dotted name, in its order; groups (dicts of keys) are not keys themselves."""
    return types.MappingProxyType({key.name: key for key in _walk(schema, "")})


def unknown(key: str, value: Any, known: Sequence[str], source: str | None = None) -> InputError:
    """Return the error for a key that does not exist.

    Args:
        key: dotted key as given.
        value: what was given for it.
        known: every dotted key that exists here.
        source: file that holds it; None: the command line.
    """
    groups = dict.fromkeys([*(name.split(".")[0] for name in known if "." in name), "experiment"])
    text = None if isinstance(value, dict) else format_value(value)
    names = [*known, *groups] if isinstance(value, str) and "." not in key else known
    assignment = meant(key, text, names) if text is not None else None
    target = (assignment or "").partition("=")[0] if assignment else meant_key(key, names)
    parent = key.rpartition(".")[0]
    if target and not any(name.rpartition(".")[0] == parent for name in known):
        parent = target.rpartition(".")[0]
    siblings = [name.rpartition(".")[2] for name in known if name.rpartition(".")[0] == parent]
    if not parent:
        siblings += [f"{group}.…" for group in groups if group != "experiment"]
    shown = "" if isinstance(value, dict) and not value else value
    reason = "is for an unknown key" + (f" in {source}" if source else "")
    is_key = target in names
    fix = assignment or (f"{target}=…" if target else f"remove {key}")
    if source is not None:
        fix = f"rename it to {target} in {source}" if is_key else f"remove it from {source}"
    return InputError(
        key, shown, reason, allowed=siblings, suggestion=target if is_key else assignment, fix=fix
    )


def meant(key: str, value: str | None, known: Sequence[str]) -> str | None:
    """Return the override that an assignment was probably meant to be, or None.

    Args:
        key: as typed, without dashes; it does not exist.
        value: as typed; None: none was typed.
        known: keys and groups that exist.
    """
    if special := suggestions.special(key, value, known):
        return special
    leaf = key.rpartition(".")[2]
    is_leaf_known = any(name.rpartition(".")[2] == leaf for name in known if not name.startswith(f"{FREE}."))
    if not is_leaf_known and (alias := suggestions.alias(key, value, known)):
        return alias
    target = meant_key(key, known)
    if target is None:
        return None
    return f"{target}=…" if value is None else suggestions.assign(target, value)


def meant_key(key: str, known: Sequence[str]) -> str | None:
    """Return the existing key that `key` most likely means: same last part, else the closest spelling."""
    leaf = key.rpartition(".")[2]
    same_leaf = [name for name in known if name.rpartition(".")[2] == leaf]
    parent = key.rpartition(".")[0]
    near = closest(leaf, [n.rpartition(".")[2] for n in known if n.rpartition(".")[0] == parent])
    if same_leaf:
        return min(same_leaf, key=lambda name: name.count("."))
    if near:
        return f"{parent}.{near}" if parent else near
    if whole := closest(key, known):
        return whole
    leaves = {name.rpartition(".")[2]: name for name in reversed(known)}
    match = closest(leaf, list(leaves))
    return leaves[match] if match else None


def validate(
    schema: type[Schema],
    values: dict[str, Any],
    texts: Mapping[str, str],
    *,
    names: Callable[[], Sequence[str]] | None = None,
    source: Callable[[str], str | None] = lambda key: None,
) -> Schema:
    """Build a schema from nested values.

    Args:
        schema: class of the result.
        values: nested values.
        texts: dotted key → value as typed or as written in a file.
        names: returns the dotted keys that exist, for a suggestion; None: those of the schema.
        source: dotted key → the file that holds it, None for the command line.

    Raises:
        InputError: an unknown key, or a value of the wrong type or out of bounds.
    """
    normal = normalize(values, texts, keys_of(schema))
    try:
        return schema.model_validate(normal)
    except ValidationError as error:
        key = _key_of(error.errors()[0]["loc"], keys_of(schema))
        known = names() if names is not None else list(keys_of(schema))
        raise _translate(error, normal, keys_of(schema), known, source(key)) from None


def normalize(values: dict[str, Any], texts: Mapping[str, str], known: Mapping[str, Key]) -> dict[str, Any]:
    """Convert values to the schema's types where YAML and the grammar of overrides guess otherwise.

    A number in a text field becomes the text as typed (`name=007`), one value in a list field a list of one, and true
    or false in a number field is refused, because Python would take it for 1 or 0.

    Args:
        values: nested values; not changed.
        texts: dotted key → as typed on the command line.
        known: keys of the schema.

    Raises:
        InputError: a truth value where a number belongs.
    """
    return {name: _normalize(name, value, texts, known) for name, value in values.items()}


def _translate(
    error: ValidationError,
    values: dict[str, Any],
    keys: Mapping[str, Key],
    names: Sequence[str],
    source: str | None,
) -> InputError:
    """Return the first problem that pydantic found as a one-line error."""
    for problem in error.errors():
        key = _key_of(problem["loc"], keys)
        value = _lookup(values, key)
        if problem["type"] == "extra_forbidden":
            return unknown(key, value, names, source)
        if key in keys:
            return _wrong_value(keys[key], value, source)
        if any(name.startswith(f"{key}.") for name in keys):
            return _value_for_group(key, format_value(value), keys, source)
    return InputError("configuration", format_value(values), f"is wrong ({error.errors()[0]['msg']})")


def _value_for_group(group: str, text: str, keys: Mapping[str, Key], source: str | None) -> InputError:
    inside = [name.rpartition(".")[2] for name in keys if name.startswith(f"{group}.")]
    guess = _inside_group(group, text, keys)
    fix = guess or f"{group}.{inside[0]}=…"
    if source is not None:
        fix = f"in {source}, below defaults: 'override /{group}: {text}'"
    return InputError(group, text, "is a group of keys", allowed=inside, suggestion=guess, fix=fix)


def format_value(value: Any) -> str:
    """Return a value as it is typed on the command line."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(format_value(item) for item in value) + "]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{name}:{format_value(item)}" for name, item in value.items()) + "}"
    return str(value)


def _wrong_value(key: Key, value: Any, source: str | None) -> InputError:
    reason = "is wrong" + (f" in {source}" if source else "")
    text = format_value(value)
    if key.name == "resume" and (command := suggestions.run_of(text)):
        reason = "names a run, and a run resumes by itself when its command is repeated"
        return InputError(key.name, text, reason, allowed=key.allowed, fix=command)
    guess = _guess(key, text)
    example = format_value(key.default) if key.default not in (None, {}, []) else _example(key, value)
    fix = suggestions.assign(key.name, guess or example)
    return InputError(key.name, text, reason, allowed=key.allowed, suggestion=guess, fix=fix)


def _guess(key: Key, text: str) -> str | None:
    """Return the accepted value that was probably meant, or None."""
    choices = key.allowed if isinstance(key.allowed, list) else []
    candidates = [suggestions.of_choice(key.name, text)]
    if text.lower() in ("auto", "default"):
        candidates.append("null")
    if "true" in choices:
        candidates.append(suggestions.of_switch(text))
    if key.is_number:
        whole = float not in {get_origin(kind) or kind for kind in _members(key.field.annotation)}
        candidates.append(suggestions.number(key.name, text, whole=whole))
    if suggestions.is_nothing(text):
        candidates.append("null")
    folded = {choice.lower(): choice for choice in choices}
    near = closest(text.lower(), folded)
    candidates.append(folded[near] if near else None)
    return next(
        (guess for guess in candidates if guess is not None and guess != text and key.accepts(guess)), None
    )


_MAIN = {"wandb": "mode", "eval": "every", "checkpoint": "every", "moments": "every", "schedule": "name"}
"""Group → its key that a value for the whole group is probably meant for."""


def _inside_group(group: str, text: str, keys: Mapping[str, Key]) -> str | None:
    key = keys.get(f"{group}.{_MAIN.get(group, '')}")
    if key is None:
        return None
    guess = text if key.accepts(text) else _guess(key, text)
    return suggestions.assign(key.name, guess) if guess else None


def _example(key: Key, value: Any) -> str:
    if key.is_list:
        # A list that is wrong has items of a wrong type; anything else becomes the one item of a list.
        candidates = ("[1]", "[a,b]") if isinstance(value, list) else (format_value([value]),)
        return next((text for text in candidates if key.accepts(text)), candidates[0])
    return "1" if key.is_number else "null"


def _walk(schema: type[BaseModel], prefix: str) -> Iterator[Key]:
    for name, field in schema.model_fields.items():
        annotation = field.annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            yield from _walk(annotation, f"{prefix}{name}.")
        else:
            yield _key(f"{prefix}{name}", field)


def _key(name: str, field: FieldInfo) -> Key:
    members = _members(field.annotation)
    choices = _choices(members)
    kinds = {get_origin(kind) or kind for kind in members}
    if type(None) in kinds:
        choices.append("null")
    phrases = [phrase for kind, phrase in _PHRASES.items() if kind in kinds]
    items = next((get_args(kind) for kind in members if get_origin(kind) is list), ())
    allowed: list[str] | str
    if bool in kinds:
        allowed = ["true", "false"]
    elif not phrases:
        allowed = choices or "a number, text or a list"
    else:
        phrase = phrases[0] + _bounds(field.metadata, field.annotation)
        if list in kinds and phrases[0] == _PHRASES[list]:
            phrase = _list_phrase(items)
        allowed = " or ".join([phrase, *choices])
    default = field.get_default(call_default_factory=True)
    doc = " ".join((field.description or "").split())
    return Key(name, allowed, default, doc, str in kinds, bool(kinds & {int, float}), list in kinds, field)


_PHRASES: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    list: "a list, e.g. [a,b]",
    dict: "a mapping, e.g. {a:1}",
    str: "text",
}


def _list_phrase(items: Sequence[Any]) -> str:
    members = [member for item in items for member in _members(item)]
    if choices := _choices(members):
        return f"a list of {', '.join(choices)}"
    if int in members or float in members:
        numbers = "numbers" if float in members else "whole numbers"
        return f"a list of {numbers}{_bounds((), items[0])}, e.g. [1,2]"
    return _PHRASES[list]


def _choices(members: Sequence[Any]) -> list[str]:
    return [str(choice) for kind in members if get_origin(kind) is Literal for choice in get_args(kind)]


def _members(annotation: Any) -> list[Any]:
    """Return the types of a union, with `Annotated` unwrapped."""
    origin = get_origin(annotation)
    if origin in (Union, types.UnionType):
        return [inner for member in get_args(annotation) for inner in _members(member)]
    if hasattr(annotation, "__metadata__"):
        return _members(get_args(annotation)[0])
    return [annotation]


def _bounds(metadata: Iterable[Any], annotation: Any) -> str:
    """Return the bounds of a number in words, from a field's metadata and the `Annotated` parts of its type."""
    limits = list(metadata)
    for member in (annotation, *get_args(annotation)):
        for extra in getattr(member, "__metadata__", ()):
            limits += extra.metadata if isinstance(extra, FieldInfo) else [extra]
    signs = [(Ge, "≥", "ge"), (Gt, ">", "gt"), (Le, "≤", "le"), (Lt, "<", "lt")]
    parts = [
        f"{sign} {getattr(m, attr):g}" for kind, sign, attr in signs for m in limits if isinstance(m, kind)
    ]
    return f" {' and '.join(parts)}" if parts else ""


def _normalize(key: str, value: Any, texts: Mapping[str, str], all_known: Mapping[str, Key]) -> Any:
    known = all_known.get(key)
    if isinstance(value, dict):
        return {name: _normalize(f"{key}.{name}", inner, texts, all_known) for name, inner in value.items()}
    if known is None or value is None:
        return value
    if known.is_text and isinstance(value, (bool, int, float)):
        return texts.get(key, format_value(value))
    if known.is_number and isinstance(value, bool):
        raise _wrong_value(known, value, None)
    if (
        known.is_list
        and not known.is_text
        and isinstance(value, (str, int, float))
        and not isinstance(value, bool)
    ):
        text = value if isinstance(value, str) else texts.get(key, format_value(value))
        is_quoted = texts.get(key, "").startswith(("'", '"'))
        # Not where several entries may be meant: `cluster.container=apptainer exec` is two of them.
        return value if " " in text and not is_quoted else [text]
    return value


def _key_of(location: Sequence[int | str], keys: Mapping[str, Key]) -> str:
    """Return the dotted key of pydantic's location, without names of union members and list positions."""
    parts: list[str] = []
    for part in location:
        if ".".join(parts) in keys:
            break
        parts.append(str(part))
    return ".".join(parts)


def _lookup(values: Any, key: str) -> Any:
    for part in key.split("."):
        if not isinstance(values, dict) or part not in values:
            return None
        values = values[part]
    return values
