"""Files that this process did not write itself, read with limits on kind, size, depth and aliases. Torch-free.

A run folder may hold anything: half a file, a named pipe, a link to a device, 431 bytes of YAML that expand to
gigabytes. Each function here either returns plain data that is safe to walk, or raises `UnreadableFile`.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import yaml

MIB = 1 << 20
JSON_LIMIT = 64 * MIB
"""Bytes of a JSON document; parameters.json of a model with 100,000 tensors has 15 MB."""
YAML_LIMIT = 2 * MIB
"""Bytes of a YAML document; a config.yaml has 5 kB."""
MAX_DEPTH = 32
"""Nested lists and objects; the deepest file of a run folder has 5."""
MAX_NODES = 200_000
"""Values of a YAML document after its aliases are expanded."""
_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}
_INT_DIGITS = 18
_YAML_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class UnreadableFile(Exception):
    """A file that cannot be read, with the reason in one line that begins with the file's name."""


def read_bytes(path: Path, limit: int, *, tail: bool = False) -> bytes:
    """Return the content of a regular file without ever waiting for a pipe or a device.

    Args:
        path: of the file; a link is followed.
        limit: largest size in bytes that is accepted.
        tail: return the last ``limit`` bytes of a larger file, which then is not an error.

    Raises:
        FileNotFoundError: no such file.
        UnreadableFile: it is not a regular file, too large, or the operating system refuses it.
    """
    try:
        # O_NONBLOCK: opening a pipe that nobody writes to would wait for ever.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except FileNotFoundError:
        if path.is_symlink():
            raise UnreadableFile(f"{path.name} is a link to a file that does not exist") from None
        raise
    except (OSError, ValueError) as error:  # ValueError: a name with a NUL
        if getattr(error, "errno", None) == errno.ENXIO:
            raise UnreadableFile(f"{path.name} is a socket or a device, not a file") from None
        raise UnreadableFile(f"{path.name} can't be opened ({_reason(error)})") from None
    try:
        facts = os.fstat(descriptor)
        if not stat.S_ISREG(facts.st_mode):
            kind = _KINDS.get(stat.S_IFMT(facts.st_mode), "special")
            raise UnreadableFile(f"{path.name} is {kind}, not a file")
        with os.fdopen(descriptor, "rb", closefd=False) as file:
            if tail:
                file.seek(max(0, facts.st_size - limit))
                return file.read(limit)
            # Some file systems report 0 for files that have content, so the size alone is not a bound.
            content = file.read(limit + 1)
    except OSError as error:
        raise UnreadableFile(f"{path.name} can't be read ({_reason(error)})") from None
    finally:
        os.close(descriptor)
    if len(content) > limit:
        raise UnreadableFile(f"{path.name} is larger than {limit / MIB:g} MiB")
    return content


def read_text(path: Path, limit: int, problems: list[str]) -> str:
    """Return a file as text; bytes that are not UTF-8 are replaced and reported in ``problems``.

    Raises:
        FileNotFoundError: no such file.
        UnreadableFile: see `read_bytes`.
    """
    content = read_bytes(path, limit)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        problems.append(f"{path.name} is not UTF-8: what can't be decoded is replaced")
        return content.decode("utf-8-sig", errors="replace")


def read_json(path: Path, problems: list[str], limit: int = JSON_LIMIT) -> Any:
    """Return the JSON document in a file; repeated keys and replaced bytes become lines of ``problems``.

    Raises:
        FileNotFoundError: no such file.
        UnreadableFile: it is not JSON, or deeper than `MAX_DEPTH`.
    """
    decoder = JsonDecoder()
    try:
        value = decoder.decode(read_text(path, limit, problems))
    except UnreadableValue as error:
        raise UnreadableFile(f"{path.name} can't be read: {error}") from None
    problems += [f"{path.name} gives {key!a} twice: the last one is used" for key in decoder.repeated[:3]]
    return value


def read_yaml(path: Path, problems: list[str], limit: int = YAML_LIMIT) -> Any:
    """Return the YAML document in a file as JSON data; repeated keys become lines of ``problems``.

    Raises:
        FileNotFoundError: no such file.
        UnreadableFile: it is not YAML of plain values, too deep, or its aliases expand too far.
    """
    text = read_text(path, limit, problems)
    try:
        repeated = _check_yaml(text)
        value = _cleaned(_YAML_LOADER(text).get_single_data())
    except Exception as error:
        # PyYAML's own constructors raise IndexError, KeyError and AttributeError for `!!int ""` and alike.
        raise UnreadableFile(f"{path.name} can't be read: {_reason(error)}") from None
    problems += [f"{path.name} gives {key!a} twice: the last one is used" for key in repeated[:3]]
    return value


class UnreadableValue(ValueError):
    """A text that is not the expected value, with the reason in one line."""


class JsonDecoder:
    """Decode JSON texts into plain data: integers of bounded size, no lone surrogates, bounded depth.

    Attributes:
        repeated: keys that an object held twice, over all texts that were decoded.
    """

    def __init__(self) -> None:
        self.repeated: list[str] = []
        self._decoder = json.JSONDecoder(object_pairs_hook=self._object, parse_int=_bounded_int)

    def decode(self, text: str) -> Any:
        """Return the value of one text.

        Raises:
            UnreadableValue: it is not JSON, or deeper than `MAX_DEPTH`.
        """
        try:
            return _cleaned(self._decoder.decode(text))
        except (ValueError, RecursionError) as error:
            raise UnreadableValue(_reason(error)) from None

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) < len(pairs):
            seen: set[str] = set()
            self.repeated += [key for key, _ in pairs if key in seen or seen.add(key)]
        return values


def _bounded_int(digits: str) -> int | float:
    """Return an integer, as a float where it is long."""
    # JSON has integers of any length; Python refuses to print those above 4,300 digits.
    return int(digits) if len(digits) <= _INT_DIGITS else float(digits)


def _cleaned(value: Any, depth: int = 0) -> Any:
    """Copy parsed data as plain JSON data.

    Raises:
        UnreadableValue: nested deeper than `MAX_DEPTH`.
    """
    if isinstance(value, str):
        # Half of a surrogate pair can't be written to any file or terminal.
        return value if value.isascii() else value.encode("utf-8", "replace").decode("utf-8")
    if value is None or isinstance(value, bool | float):
        return value
    if isinstance(value, int):
        return value if value.bit_length() < 64 else float("inf") if value > 0 else float("-inf")
    if depth >= MAX_DEPTH:
        raise UnreadableValue(f"nested deeper than {MAX_DEPTH}")
    if isinstance(value, dict):
        return {_cleaned(_key(key)): _cleaned(inner, depth + 1) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_cleaned(inner, depth + 1) for inner in value]
    return value.isoformat() if isinstance(value, date) else repr(value)


def _key(key: object) -> str:
    """Return a mapping's key as text: YAML's keys may be null, numbers and dates."""
    return key if isinstance(key, str) else "null" if key is None else str(_cleaned(key))


@dataclass
class _Node:
    """A YAML list or mapping that is being read.

    Attributes:
        anchor: its name for aliases; None: it has none.
        size: values in it, aliases expanded.
        height: levels below it.
        keys: of a mapping; None for a list.
        count: entries so far, keys and values counted.
    """

    anchor: str | None
    keys: set[str] | None
    size: int = 1
    height: int = 1
    count: int = 0
    repeated: list[str] = field(default_factory=list)


def _check_yaml(text: str) -> list[str]:
    """Walk the events of a YAML text before anything is built from it; returns its repeated keys.

    Raises:
        UnreadableValue: too deep, too large after expansion, or an alias inside of what it names.
        yaml.YAMLError: no YAML.
    """
    open_nodes: list[_Node] = []
    anchors: dict[str, tuple[int, int]] = {}
    repeated: list[str] = []
    for event in yaml.parse(text, Loader=_YAML_LOADER):
        if isinstance(event, yaml.MappingStartEvent | yaml.SequenceStartEvent):
            keys: set[str] | None = set() if isinstance(event, yaml.MappingStartEvent) else None
            open_nodes.append(_Node(event.anchor, keys))
            if len(open_nodes) > MAX_DEPTH:
                raise UnreadableValue(f"nested deeper than {MAX_DEPTH}")
            continue
        if isinstance(event, yaml.MappingEndEvent | yaml.SequenceEndEvent):
            node = open_nodes.pop()
            size, height, anchor = node.size, node.height, node.anchor
        elif isinstance(event, yaml.AliasEvent):
            anchor = None
            if event.anchor in (node.anchor for node in open_nodes):
                raise UnreadableValue(f"the alias *{event.anchor} is inside of what it names")
            size, height = anchors.get(event.anchor, (1, 0))
        elif isinstance(event, yaml.ScalarEvent):
            size, height, anchor = 1, 0, event.anchor
        else:
            continue
        if anchor is not None:
            anchors[anchor] = (size, height)
        if not open_nodes:
            continue
        parent = open_nodes[-1]
        if parent.keys is not None and parent.count % 2 == 0 and isinstance(event, yaml.ScalarEvent):
            repeated += [event.value] if event.value in parent.keys else []
            parent.keys.add(event.value)
        parent.count += 1
        parent.size += size
        parent.height = max(parent.height, height + 1)
        if parent.size > MAX_NODES:
            raise UnreadableValue(f"holds more than {MAX_NODES:,} values (aliases expanded)")
        if len(open_nodes) + height > MAX_DEPTH:
            raise UnreadableValue(f"nested deeper than {MAX_DEPTH}")
    return repeated


def _reason(error: BaseException) -> str:
    if isinstance(error, RecursionError):
        return f"nested deeper than {MAX_DEPTH}"
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(str(text).split())[:200]
