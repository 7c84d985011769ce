"""Errors of reading a local file, each with the key that names the file, the file, and the row."""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from harness.data import formats
from harness.data.formats import DamagedFile
from harness.errors import InputError

NAMES = {
    "text": "UTF-8 text",
    "jsonl": "JSON lines",
    "json": "a JSON list",
    "csv": "comma-separated text",
    "tsv": "tab-separated text",
    "parquet": "Parquet",
}
"""Source of local files → what such a file holds."""


class Place:
    """Where in a file reading has got to, for messages.

    Attributes:
        path: the file.
        row: line, item or row with its number, as in ", line 5"; empty: the whole file.
        key: configuration key that names the file.
    """

    def __init__(self, path: Path, key: str = "data.files") -> None:
        self.path, self.row, self.key = path, "", key

    def __str__(self) -> str:
        return f"{self.path}{self.row}"


@contextmanager
def named(place: Place) -> Iterator[None]:
    """Raise errors of the file system and of damaged files as InputError that names ``place``."""
    try:
        yield
    except DamagedFile as error:
        fix = "decompress it yourself" if "bomb" in str(error) else "another copy of the file"
        raise InputError(place.key, place, str(error), fix=fix) from error
    except OSError as error:
        raise InputError(place.key, place, f"cannot be read ({error.strerror or error})") from error


def refuse_other_formats(place: Place, file: io.BufferedReader, source: str) -> None:
    """Raise InputError if the first bytes of ``file`` are those of a format that is not ``source``."""
    known = formats.recognize(file.peek(formats.HEAD_BYTES)[: formats.HEAD_BYTES])
    if known is not None:
        path = str(place.path)
        raise InputError(place.key, path, f"is {known.name}, not {NAMES[source]}", fix=fix_of(known, path))


def refuse_larger_than_memory(place: Place, noun: str, fix: str) -> None:
    """Raise InputError if the file, which is read at once, would fill the memory that is free.

    Args:
        noun: what the file is, as in "one document".
    """
    import psutil

    size, free = place.path.stat().st_size, psutil.virtual_memory().available
    if 2 * size > free:
        reason = f"is {noun} of {size / 1e9:,.1f} GB, and {free / 1e9:,.1f} GB of memory are free"
        raise InputError(place.key, place, reason, fix=fix)


def fix_of(known: formats.Format, path: str) -> str:
    """Return what to do with a file of another format."""
    # An f-string of its own: a path may hold braces.
    return known.fix.replace("{file}", path)


def not_utf8(place: Place, data: bytes, error: UnicodeDecodeError, codec: str | None) -> InputError:
    """Return the error for ``data`` that does not decode; ``codec`` compresses the file."""
    if formats.is_binary(data[: 2**20]):
        reason = f"is binary data, neither {NAMES['text']} nor a format that is known here"
        return InputError(place.key, place, reason, allowed="UTF-8 text, JSON lines or Parquet")
    reason = f"is not UTF-8 text ({error.reason}, byte {error.start})"
    fix = f"iconv -f ENCODING -t UTF-8 {place.path} > NEW_FILE"
    if codec is not None:
        reason, fix = (
            f"holds text that is not UTF-8 ({error.reason}, byte {error.start})",
            (f"decompress it ({codec}), convert the text to UTF-8, and name the new file"),
        )
    return InputError(place.key, place, reason, fix=fix)


def shown(names: Iterable[object]) -> list[str]:
    """Return the first names, shortened, for a message: a key of a damaged file may be a megabyte long."""
    return [str(name)[:60] for name in itertools.islice(names, 20)]
