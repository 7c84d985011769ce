"""Templates of prompts and answers: text with ``{column}``; ``{{`` and ``}}`` are literal braces.

A backslash with an n is a line break, because neither a shell nor Hydra makes one of it; two backslashes with an n
are a backslash and an n.
"""

from __future__ import annotations

import re
import string
from collections.abc import Mapping
from functools import lru_cache

from harness.data.file_errors import shown
from harness.data.rows import Value
from harness.errors import InputError

_LINE_BREAK = re.compile(r"(\\?)\\n")
_ALLOWED = "text with {column}; {{ and }} are literal braces"


def columns_of(template: str, key: str = "task.prompt") -> list[str]:
    """Return the columns that a template names, each once, in the order of their first place.

    Args:
        template: text with ``{column}``.
        key: configuration key of the template, for messages.

    Raises:
        InputError: a brace without its partner, ``{}`` without a name, or more than a name in the braces.
    """
    return list(dict.fromkeys(name for _, name in _parts(template, key) if name is not None))


def fill(template: str, row: Mapping[str, Value], key: str = "task.prompt") -> str:
    """Return the template with the values of ``row`` in the places of their columns.

    A column's value is inserted as it is: braces in it are text. True and False become ``true`` and ``false``, None
    an empty text, a float the shortest decimal number that reads back as it.

    Raises:
        InputError: as `columns_of`, or a column that the row does not have, with the columns that it has.
    """
    pieces = []
    for text, name in _parts(template, key):
        pieces.append(text)
        if name is not None:
            if name not in row:
                raise InputError(key, name, "is not a column of the data", allowed=shown(row))
            pieces.append(text_of(row[name]))
    return "".join(pieces)


def literal_texts(template: str, key: str = "task.prompt") -> list[str]:
    """Return the texts of a template between its columns, with braces and line breaks as `fill` writes them.

    Raises:
        InputError: as `columns_of`.
    """
    return [text for text, _ in _parts(template, key)]


def text_of(value: Value) -> str:
    """Return the text of a value: as in JSON, without quotes; None is an empty text."""
    if isinstance(value, bool):
        return "true" if value else "false"
    return "" if value is None else str(value)


@lru_cache(maxsize=64)
def _parts(template: str, key: str) -> tuple[tuple[str, str | None], ...]:
    """Return pairs of text and the column that follows it (None at the end of the template)."""
    try:
        parsed = list(string.Formatter().parse(template))
    except ValueError as error:
        fix = "{{ and }} for braces that are text"
        raise InputError(key, template, f"is no template ({error})", allowed=_ALLOWED, fix=fix) from error
    parts: list[tuple[str, str | None]] = []
    for raw, name, spec, conversion in parsed:
        text = _LINE_BREAK.sub(lambda found: "\\n" if found[1] else "\n", raw)
        if name is None:
            parts.append((text, None))
            continue
        if not name:
            reason = "has {} without the name of a column"
            raise InputError(key, template, reason, allowed=_ALLOWED, fix=f"{key}=… with {{column}}")
        if spec or conversion:
            reason = f"has a format after the column {name}, which templates do not take"
            raise InputError(key, template, reason, allowed=_ALLOWED, fix=f"{{{name}}}")
        parts.append((text, name))
    return tuple(parts)
