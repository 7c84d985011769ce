"""Read a YAML file with limits, and say in which line a key is. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from harness.errors import InputError
from harness.files import bounded
from harness.files.bounded import MAX_DEPTH, UnreadableFile

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
