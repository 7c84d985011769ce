"""Keys of companion jobs: from overrides and experiment files to a checked schema, and the text of `--help`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from pydantic import ConfigDict, Field

from harness.config import sources, yaml_files
from harness.config.overrides import leaves, parse
from harness.config.typed_keys import TypedKeys, format_value, keys_of, unknown, validate
from harness.errors import InputError

OPTIONS = "options"
"""Field of `JobKeys` that holds options of optimizers; it is typed as ``NAME.option``, never by this name."""


class JobKeys(TypedKeys):
    """Base of a companion job's keys. A field's docstring is its meaning, its type and bounds are checked."""

    model_config = ConfigDict(frozen=True)

    options: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Optimizer → its options, typed as ``NAME.option=value``; "" holds those of all optimizers."""


Keys = TypeVar("Keys", bound=JobKeys)


def read(
    schema: type[Keys],
    overrides: Sequence[str],
    *,
    command: str,
    optimizers: Mapping[str, str],
    defaults: Callable[[Mapping[str, Any]], Mapping[str, Any]] = lambda values: {},
) -> Keys:
    """Parse the overrides of a companion job.

    A list is ``[a,b]`` or ``a,b``, and one value where a list is expected is a list of one. ``experiment=NAME`` reads
    configs/experiment/NAME.yaml, over which the other overrides win.

    Args:
        schema: keys of the job.
        overrides: ``key=value`` arguments.
        command: name of the job; names of its experiments begin with it.
        optimizers: prefix of ``NAME.option`` → its key in ``options``; "" is for all optimizers.
        defaults: values by dotted key → defaults that depend on them, such as those of a mode.

    Raises:
        InputError: an unknown key or experiment, a value of the wrong type or out of bounds.
    """
    assignments = parse([bracketed(override) for override in overrides], lambda *_: None)
    values: dict[str, Any] = {}
    texts: dict[str, str] = {}
    for assignment in assignments:
        if assignment.key == "experiment":
            values = {**leaves("", experiment(assignment.text, command)), **values}
        else:
            values |= leaves(assignment.key, assignment.value)
            texts[assignment.key] = assignment.text.strip("'\"")
    nested: dict[str, Any] = {OPTIONS: {}}
    known = [key for key in keys_of(schema) if key != OPTIONS]
    for key, value in {**defaults(values), **values}.items():
        owner, dot, option = key.partition(".")
        if dot and owner in optimizers:
            nested[OPTIONS].setdefault(optimizers[owner], {})[option] = value
        elif key in known:
            _set(nested, key, value)
        else:
            raise unknown(key, value, [*known, "experiment"])
    return validate(schema, nested, texts)


def text(schema: type[JobKeys]) -> str:
    """Return every key of a job with default and meaning, one a line, for ``--help``."""
    keys = [key for name, key in keys_of(schema).items() if name != OPTIONS]
    return listed((key.name, key.default, key.doc.removesuffix(".")) for key in keys)


def bracketed(override: str) -> str:
    """Return `w=2,-0.5` as `w=[2,-0.5]`, which is how the grammar of overrides writes a list."""
    key, equals, value = override.partition("=")
    is_list = equals and "," in value and value[0] not in "[{'\"("
    return f"{key}=[{value}]" if is_list else override


def experiment(name: str, command: str) -> dict[str, Any]:
    """Read configs/experiment/NAME.yaml.

    Args:
        name: of the file.
        command: whose keys it should hold; names of its experiments begin with it.

    Raises:
        InputError: no such file, no YAML, or keys of a training run.
    """
    path = sources.find("experiment", name)
    if path is None:
        choices = [option for option in sources.options("experiment") if option.startswith(command)]
        fix = f"experiment={choices[0]}" if choices else None
        raise InputError("experiment", name, allowed=choices, fix=fix)
    content = yaml_files.read("experiment", path)
    if not isinstance(content, dict):
        raise InputError("experiment", path, "holds no keys")
    if "defaults" in content:
        raise InputError("experiment", name, "is for optbench train", fix=f"optbench train experiment={name}")
    return content


def listed(rows: Iterable[tuple[str, Any, str]]) -> str:
    """Return the lines of ``--help`` for rows of (key, default, meaning)."""
    lines = ["keys (default; meaning); a list is [a,b] or a,b:"]
    lines += [f"  {key}={_default(default)}  {meaning}".rstrip() for key, default, meaning in rows]
    return "\n".join([*lines, "  OPTIMIZER.option=…  options of an optimizer: optbench show NAME"])


def _set(values: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for parent in parents:
        values = values.setdefault(parent, {})
    values[last] = value


def _default(value: Any) -> str:
    if isinstance(value, list | tuple):
        return f"[{','.join(map(_default, value))}]"
    return f"{value:g}" if isinstance(value, float) else format_value(value)
