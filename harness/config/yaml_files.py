"""Read a YAML file with limits, say in which line a key is, and fill in its interpolations. No torch.

An interpolation is ``${key}``, or ``${oc.env:NAME}`` of a variable on an allow list. A configuration is written to the
run folder, to W&B and into batch scripts, so what a file may take from the environment is listed here. Every other
resolver of OmegaConf, Hydra and plug-ins is refused.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from harness.errors import InputError
from harness.files import bounded
from harness.files.bounded import MAX_DEPTH, UnreadableFile
from harness.redaction import is_secret_name, secret_in

MAX_BYTES = 1 << 18
_FAST_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class Scalar(NamedTuple):
    """Where a value is and how it is written.

    Attributes:
        line: counted from 1.
        text: as written, without quotes; None for lists and mappings.
    """

    line: int
    text: str | None


def read(key: str, path: Path) -> Any:
    """Return the content of a YAML file.

    Numbers are those of Python and JSON (``1e-3`` is one), dates stay text, and a key given twice is an error.

    Args:
        key: whose value named the file, for the error.
        path: of the file.

    Raises:
        InputError: the file is missing, too large, not text or not YAML; file and line are named.
    """
    from omegaconf._utils import get_yaml_loader

    problems: list[str] = []
    try:
        text = bounded.read_text(path, MAX_BYTES, problems)
        depth = 0
        for event in yaml.parse(text, Loader=_FAST_LOADER):  # syntax first, as its errors know their line
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > MAX_DEPTH:
                raise UnreadableFile(f"{path.name} is nested deeper than {MAX_DEPTH}")
        bounded.read_yaml(path, [])
        if problems:
            raise UnreadableFile(problems[0])
        return get_yaml_loader()(text).get_single_data()
    except FileNotFoundError:
        raise InputError(key, path, "does not exist", fix="name an existing YAML file") from None
    except UnreadableFile as error:
        raise InputError(key, path, f"cannot be read ({error})", fix=f"correct {path}") from None
    except (yaml.YAMLError, ValueError, TypeError) as error:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or error
        line = f" in line {mark.line + 1}" if mark else ""
        reason = f"cannot be read: it is not YAML ({problem}{line})"
        raise InputError(key, path, reason, fix=f"correct {path}") from None


def places(path: Path) -> dict[str, Scalar]:
    """Return where each dotted key of a file is; empty for a file that cannot be read.

    Args:
        path: of the file.
    """
    try:
        root = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except (OSError, ValueError, yaml.YAMLError, RecursionError):
        return {}
    return dict(_places(root, "", 0))


def at(path: Path, key: str) -> str:
    """Return "FILE, line N" for a dotted key of a file, or the file alone where the key is not found."""
    known = places(path)
    while key and key not in known:
        key = key.rpartition(".")[0]
    return f"{path}, line {known[key].line}" if key else str(path)


def _places(node: yaml.Node | None, prefix: str, depth: int) -> Iterator[tuple[str, Scalar]]:
    if not isinstance(node, yaml.MappingNode) or depth > MAX_DEPTH:
        return
    for name, value in node.value:
        key = f"{prefix}{name.value}" if isinstance(name, yaml.ScalarNode) else f"{prefix}?"
        text = value.value if isinstance(value, yaml.ScalarNode) else None
        yield key, Scalar(name.start_mark.line + 1, text)
        yield from _places(value, f"{key}.", depth + 1)


READABLE_VARIABLES = (
    "HOME",
    "USER",
    "LOGNAME",
    "TMPDIR",
    "SCRATCH",
    "WORK",
    "PROJECT",
    "HF_HOME",
    "XDG_CACHE_HOME",
)
"""Variables that ``${oc.env:NAME}`` may name, besides those that begin with one of `READABLE_PREFIXES`."""
READABLE_PREFIXES = ("OPTBENCH_", "SLURM_")
READABLE = f"{', '.join(READABLE_VARIABLES)}, and names that begin with {' or '.join(READABLE_PREFIXES)}"

_START = re.compile(r"(?<!\\)(?:\\\\)*(?=\$\{)")
"""Up to an interpolation that no backslash makes literal."""
_KEY = re.compile(r"\$\{[\w.\[\]\s/-]+\}")
_VARIABLE = re.compile(r"\$\{\s*oc\.env\s*:\s*(?P<name>\w+)\s*(?:,[^${}]*)?\}")
_RESOLVER = re.compile(r"\$\{\s*(?P<name>[^:${}]*)")


def is_allowed(variable: str) -> bool:
    """Return True if a file may read this environment variable: it is listed and its name is not a secret's."""
    listed = variable in READABLE_VARIABLES or variable.startswith(READABLE_PREFIXES)
    return listed and not is_secret_name(variable)


def resolve_interpolations(
    values: dict[str, Any], defaults: dict[str, Any], origin: Callable[[str], str | None]
) -> dict[str, Any]:
    """Return the values with their interpolations filled in.

    Args:
        values: nested, as composed.
        defaults: nested; what an interpolation may name besides the values.
        origin: dotted key → the file that holds it, or None for the command line.

    Raises:
        InputError: a resolver or a variable that is not allowed, or an interpolation that cannot be filled in.
    """
    texts = {key: text for key, text in _texts(values, "") if "${" in text}
    if not texts:
        return values
    for key, text in texts.items():
        _check_interpolations(key, text, origin(key))
    try:
        with only_allowed_variables():
            merged = OmegaConf.merge(OmegaConf.create(defaults), OmegaConf.create(values))
            resolved = _part(OmegaConf.to_container(merged, resolve=True), values)
    except (OmegaConfBaseException, ValueError, RecursionError) as error:
        key = str(getattr(error, "full_key", None) or next(iter(texts)))
        first = next(iter(str(error).splitlines()), type(error).__name__)
        reason = _where(f"cannot be filled in ({first})", origin(key))
        raise InputError(key, texts.get(key, ""), reason, fix=_ESCAPE) from None
    for key, text in _texts(resolved, ""):
        if key in texts and (secret := secret_in(text)):
            raise InputError(key, texts[key], _where(f"holds {secret}", origin(key)), fix=f"leave {key} out")
    return resolved


def _part(resolved: Any, values: Any) -> Any:
    """Return the resolved values of the keys in `values`, without the defaults below them."""
    if isinstance(values, dict) and isinstance(resolved, dict):
        return {str(key): _part(resolved[key], value) for key, value in values.items()}
    return resolved


@contextmanager
def only_allowed_variables() -> Iterator[None]:
    """Let OmegaConf read only allowed environment variables, also from inside other resolvers."""
    from omegaconf.resolvers import oc

    OmegaConf.register_new_resolver("oc.env", _environment, replace=True)
    try:
        yield
    finally:
        OmegaConf.register_new_resolver("oc.env", oc.env, replace=True)


def _environment(name: str, *default: Any) -> Any:
    if not is_allowed(name):
        raise ValueError(f"the environment variable {name} is not on the list of those that a file may read")
    if name in os.environ:
        return os.environ[name]
    if default:
        return default[0]
    raise ValueError(f"the environment variable {name} is not set")


def _check_interpolations(key: str, text: str, source: str | None) -> None:
    for match in _START.finditer(text):
        if _KEY.match(text, match.end()):
            continue
        variable = _VARIABLE.match(text, match.end())
        if variable is None:
            named = _RESOLVER.match(text, match.end())
            name = named["name"].strip() if named else ""
            reason = _where(f"uses {name or 'an interpolation'}, which is not allowed here", source)
            allowed = "${key} and ${oc.env:NAME}, not nested"
            raise InputError(key, text, reason, allowed=allowed, fix=_ESCAPE)
        if not is_allowed(name := variable["name"]):
            fix = f"type {key}=… on the command line, or export OPTBENCH_{name}"
            if is_secret_name(name):
                fix = f"leave {key} out: a configuration is kept and uploaded; programs read {name} by themselves"
            reason = _where(f"reads {name}, which a file may not", source)
            raise InputError(key, text, reason, allowed=READABLE, fix=fix)


_ESCAPE = "type the value itself; in a file, a literal ${ is written \\${"


def _where(reason: str, source: str | None) -> str:
    return f"in {source} {reason}" if source else reason


def _texts(value: Any, key: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, dict):
        for name, inner in value.items():
            yield from _texts(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list):
        for place, inner in enumerate(value):
            yield from _texts(inner, f"{key}[{place}]")
