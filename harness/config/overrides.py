"""What a user gives for a run: ``key=value`` overrides in Hydra's grammar, and a FILE.yaml of keys.

Nothing is dropped: an argument that is not an assignment, a sweep, a deletion or two values for one key is an error.

A file holds the keys of the command line, nested or dotted, such as a run's config.yaml or config.diff.yaml. A group
with a plain value chooses (``optimizer: sumo``), as does the ``name`` in a nested group; the other values are set on
top, before those of the command line.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, QuotedString, ValueType
from hydra.errors import HydraException

from harness.config import suggestions, yaml_files
from harness.config.sources import GROUPS, find
from harness.config.suggestions import is_run_file
from harness.errors import InputError
from harness.visible import visible

MAX_LENGTH = 20_000
"""Characters of one override."""


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


def parse(overrides: Sequence[str], suggest: Callable[[str, str | None], str | None]) -> list[Assignment]:
    """Parse overrides.

    Args:
        overrides: ``key=value`` arguments.
        suggest: (argument, following argument or None) → the override that was probably meant, or None.

    Raises:
        InputError: an argument that is not `key=value`, a value that cannot be read, several values for one run,
            a deletion, or one key with two values.
    """
    parser = OverridesParser.create()
    assignments = []
    for position, override in enumerate(overrides):
        following = overrides[position + 1] if position + 1 < len(overrides) else None
        assignments.append(_assignment(parser, override, following, suggest))
    _refuse_conflicts(assignments)
    return assignments


def leaves(key: str, value: Any) -> dict[str, Any]:
    """Flatten a nested value to dotted keys: ``("a", {"b": 1})`` → ``{"a.b": 1}``; an empty mapping is a leaf."""
    if not isinstance(value, dict) or not value:
        return {key: value}
    merged: dict[str, Any] = {}
    for name, inner in value.items():
        merged |= leaves(f"{key}.{name}" if key else str(name), inner)
    return merged


def _assignment(
    parser: OverridesParser,
    override: str,
    following: str | None,
    suggest: Callable[[str, str | None], str | None],
) -> Assignment:
    key, equals, text = override.partition("=")
    _refuse_broken_text(key, override)
    if override.startswith("~"):
        fix = f"{key[1:]}=null" if len(key) > 1 else "leave it out"
        raise InputError(override, "", "deletes a key, and every key has a value", fix=fix)
    if not equals or override.startswith("-") or not key.strip():
        meant = suggest(override, following)
        raise InputError(
            override or "''",
            "",
            "is not an assignment",
            suggestion=meant,
            allowed="key=value, without dashes, or a FILE.yaml of keys",
            fix=meant or "write it as key=value, or leave it out",
        )
    home = os.path.expanduser("~")
    # A shell expands ~ only at the start of an argument, and Hydra's grammar does not know it.
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


def _refuse_broken_text(key: str, override: str) -> None:
    """Refuse what cannot go into files and batch scripts: invalid UTF-8, a NUL character, endless text."""
    problem = "is longer than 20,000 characters" if len(override) > MAX_LENGTH else None
    if any(0xD800 <= ord(letter) < 0xE000 for letter in override):
        problem = "is not UTF-8"
    if "\0" in override:
        problem = "holds a NUL character"
    if problem:
        fix = "type it again as plain text, or put the keys into a FILE.yaml"
        raise InputError(visible(key)[:80], visible(override.partition("=")[2])[:80], problem, fix=fix)


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
    """Convert Hydra's parse result to plain Python values."""
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


class RunFile(NamedTuple):
    """The content of a FILE.yaml of keys.

    Attributes:
        path: of the file.
        choices: group → option.
        values: dotted key → value.
        texts: dotted key → scalar as written.
    """

    path: Path
    choices: dict[str, str]
    values: dict[str, Any]
    texts: dict[str, str]

    @property
    def is_recorded(self) -> bool:
        """Return True for the config.yaml of a run, which holds what the checks filled in."""
        return self.values.get("optimizer.lr_source") is not None

    @property
    def is_whole_model(self) -> bool:
        """Return True if the file describes a model completely, so that no preset's configuration is below it."""
        return "model.model_type" in self.values

    def without(self, groups: Sequence[str]) -> RunFile:
        """Return the file without its choices and values of some groups."""
        kept = {key: value for key, value in self.values.items() if key.partition(".")[0] not in groups}
        choices = {group: option for group, option in self.choices.items() if group not in groups}
        return self._replace(choices=choices, values=kept)


def split_run_file(arguments: Sequence[str]) -> tuple[RunFile | None, list[str]]:
    """Read the FILE.yaml among the arguments, and return it with the other arguments.

    Raises:
        InputError: two files, or one that cannot be read.
    """
    before = ["", *arguments]
    # The argument after a flag is its value: `--config my.yaml` gets an error that says what to type.
    files = [
        argument
        for flag, argument in zip(before, arguments)
        if is_run_file(argument) and not flag.startswith("-")
    ]
    if len(files) > 1:
        both = " and ".join(files)
        raise InputError("file", both, "are two files for one run", fix=f"optbench train {files[0]}")
    return (read_run_file(Path(files[0]).expanduser()) if files else None), [
        argument for argument in arguments if argument not in files
    ]


def read_run_file(path: Path) -> RunFile:
    """Read the keys of a run from a YAML file.

    Raises:
        InputError: no such file, no YAML, no mapping, or a key given in two ways.
    """
    content = yaml_files.read("file", path)
    if not isinstance(content, dict) or not content:
        raise InputError("file", path, "holds no keys", fix="lines such as 'steps: 100'")
    choices = _defaults(path, content.pop("defaults", []))
    values: dict[str, Any] = {}
    for name, value in content.items():
        if name in GROUPS and not isinstance(value, dict):
            if value is not None:
                choices[str(name)] = str(value)
            continue
        if name in GROUPS and isinstance(value, dict):
            option = value.get("name")
            if isinstance(option, str) and find(str(name), option) is not None:
                choices[str(name)] = option
        for key, leaf in leaves(str(name), value).items():
            if key in values:
                raise InputError(
                    key, leaf, f"is given twice in {yaml_files.at(path, key)}", fix="keep one of them"
                )
            values[key] = leaf
    places = yaml_files.places(path)
    texts = {key: place.text for key, place in places.items() if place.text is not None}
    file = RunFile(path, choices, values, texts)
    # A run's config.yaml is complete: what a preset holds today is not merged below it.
    return file._replace(choices={}) if file.is_recorded else file


def _defaults(path: Path, entries: Any) -> dict[str, str]:
    """Return the choices of a defaults list: ``- override /model: llama_9m``."""
    choices: dict[str, str] = {}
    for entry in entries if isinstance(entries, list) else [entries]:
        if entry == "_self_":
            continue
        pair = next(iter(entry.items())) if isinstance(entry, dict) and len(entry) == 1 else None
        group = str(pair[0]).removeprefix("override").strip().lstrip("/") if pair else ""
        if pair is None or group not in GROUPS:
            where = yaml_files.at(path, "defaults")
            fix = "entries such as '- override /model: llama_9m'"
            raise InputError("defaults", entry, f"in {where} chooses no group", allowed=GROUPS, fix=fix)
        if pair[1] is not None:
            choices[group] = str(pair[1])
    return choices
