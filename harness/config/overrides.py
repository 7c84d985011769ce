"""Command-line words: `key=value` in Hydra's grammar, and a clear refusal of everything else.

Nothing is dropped: a word that is not an assignment, a sweep, a deletion or two values for one key is an
error.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, QuotedString, ValueType
from hydra.errors import HydraException

from harness.config import suggestions
from harness.errors import InputError
from harness.visible import visible

MAX_LENGTH = 20_000
"""Characters of one word."""


class Assignment(NamedTuple):
    """One `key=value`.

    Attributes:
        key: dotted key, or a group name.
        value: parsed value (int, float, bool, str, None, list or dict).
        text: the value as typed.
    """

    key: str
    value: Any
    text: str


def parse(words: Sequence[str], suggest: Callable[[str, str | None], str | None]) -> list[Assignment]:
    """Read command-line words.

    Args:
        words: what stands after the command.
        suggest: (word, following word or None) → the assignment that was probably meant, or None.

    Raises:
        InputError: a word that is not `key=value`, a value that cannot be read, several values for one run,
            a deletion, or one key with two values.
    """
    parser = OverridesParser.create()
    assignments = []
    for position, word in enumerate(words):
        following = words[position + 1] if position + 1 < len(words) else None
        assignments.append(_assignment(parser, word, following, suggest))
    _refuse_conflicts(assignments)
    return assignments


def leaves(key: str, value: Any) -> dict[str, Any]:
    """A nested value as dotted keys: ``("a", {"b": 1})`` → ``{"a.b": 1}``; an empty mapping stays a leaf."""
    if not isinstance(value, dict) or not value:
        return {key: value}
    merged: dict[str, Any] = {}
    for name, inner in value.items():
        merged |= leaves(f"{key}.{name}" if key else str(name), inner)
    return merged


def _assignment(
    parser: OverridesParser,
    word: str,
    following: str | None,
    suggest: Callable[[str, str | None], str | None],
) -> Assignment:
    key, equals, text = word.partition("=")
    _refuse_broken_text(key, word)
    if word.startswith("~"):
        fix = f"{key[1:]}=null" if len(key) > 1 else "leave it out"
        raise InputError(word, "", "deletes a key, and every key has a value", fix=fix)
    if not equals or word.startswith("-") or not key.strip():
        meant = suggest(word, following)
        raise InputError(
            word or "''",
            "",
            "is not an assignment",
            suggestion=meant,
            allowed="key=value, without dashes, or a FILE.yaml of keys",
            fix=meant or "write it as key=value, or leave it out",
        )
    home = os.path.expanduser("~")
    # A shell expands ~ only at the start of a word, and Hydra's grammar does not know it.
    parsed = _parse(parser, key, f"{home}{text[1:]}" if text.startswith("~/") else text)
    name = key.lstrip("+")
    if "@" in name:
        fix = f"{name.split('@')[0]}={text}"
        raise InputError(name, text, "moves a group, and groups have one place", fix=fix)
    if parsed.value_type is not ValueType.ELEMENT:
        one = suggestions.number(name, text, whole=True) or suggestions.number(name, text, whole=False)
        fix = f"{name}={text.split(',')[0]} (one run for each), or {name}=[{text}] where a list is meant"
        fix = f"{name}={one}" if one else fix
        reason = "is several values, and a run takes one"
        raise InputError(name, text, reason, allowed="one value", suggestion=one, fix=fix)
    return Assignment(name, _plain(parsed._value), text)


def _refuse_broken_text(key: str, word: str) -> None:
    """A value goes into files and batch scripts: no bytes that are not UTF-8, no NUL, no endless text."""
    problem = "is longer than 20,000 characters" if len(word) > MAX_LENGTH else None
    if any(0xD800 <= ord(letter) < 0xE000 for letter in word):
        problem = "is not UTF-8"
    if "\0" in word:
        problem = "holds a NUL character"
    if problem:
        fix = "type it again as plain text, or put the keys into a FILE.yaml"
        raise InputError(visible(key)[:80], visible(word.partition("=")[2])[:80], problem, fix=fix)


def _parse(parser: OverridesParser, key: str, text: str) -> Override:
    try:
        return parser.parse_override(f"{key}={text}")
    except (HydraException, ValueError, RecursionError) as error:
        # ValueError: a number with thousands of digits, text that is not Unicode.
        problem = next(iter(str(error).splitlines()), type(error).__name__)
        guess = suggestions.number(key, text, whole=True) or suggestions.number(key, text, whole=False)
        fix = f"{key}={guess}" if guess else f"put it in quotes: '{key}=\"{text}\"'"
        if len(text) > 200:
            text, fix = f"{text[:40]}… ({len(text):,} characters)", "a shorter value"
        if "${" in text:
            fix = f"leave out ${{, or write {key}=${{KEY}} or {key}=${{oc.env:NAME}}"
        reason = f"cannot be read ({problem})"
        raise InputError(key, text, reason, suggestion=guess, fix=fix) from None


def _plain(value: Any) -> Any:
    """Hydra's parse result as plain Python values."""
    if isinstance(value, QuotedString):
        return value.text
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {str(_plain(key)): _plain(item) for key, item in value.items()}
    return value


def _refuse_conflicts(assignments: list[Assignment]) -> None:
    seen: dict[str, Assignment] = {}
    for assignment in assignments:
        for key, value in leaves(assignment.key, assignment.value).items():
            before = seen.setdefault(key, Assignment(key, value, str(value)))
            # By text too: NaN is not equal to itself.
            if before.text != str(value) and before.value != value:
                both = f"{before.text} and {value}"
                raise InputError(key, both, "are two values for one key", fix=f"{key}={value}")
