"""Documents from local files: text (a file is a document), or a column of the rows that other formats hold.

A row without text (null, or no such key where other rows have it) is None, in every source.
"""

from __future__ import annotations

import codecs
import os
from collections.abc import Iterator
from pathlib import Path

from harness.data import row_files
from harness.data.file_errors import (
    Place,
    named,
    not_utf8,
    refuse_larger_than_memory,
    refuse_other_formats,
)
from harness.data.formats import open_decompressed
from harness.data.row_files import RowLayout
from harness.errors import InputError
from harness.files import paths


def find(patterns: list[str], source: str, key: str = "data.files") -> list[Path]:
    """List the files that ``patterns`` (paths or globs; ``**`` and ``~`` work) name, each once.

    A path that exists is taken before it is read as a glob. Patterns keep their order, the files of one
    pattern are sorted: the same files give the same corpus on every machine, wherever they are.

    Args:
        patterns: as configured.
        source: ``data.source``.
        key: configuration key that holds the patterns.

    Raises:
        InputError: no pattern, one that matches no file, or something that is not a file.
    """
    if not patterns:
        raise InputError(
            key,
            "[]",
            f"names no file for data.source={source}",
            fix=f"{key}=[FOLDER/*.{source}]",
        )
    found: dict[Path, None] = {}
    for pattern in patterns:
        matches = [(path, paths.kind(path)) for path in paths.expand(pattern)]
        # A pattern may match folders next to files; anything else that it matches was meant as data.
        files = [(path, kind) for path, kind in matches if kind != "is a folder"]
        if not files:
            raise _no_file(key, pattern, [path for path, _ in matches])
        for path, kind in files:
            if kind is not None:
                raise InputError(key, path, kind, fix=f"cat {path} > FILE" if "pipe" in kind else None)
            if not os.access(path, os.R_OK):
                raise InputError(key, path, "cannot be read (Permission denied)", fix=f"chmod +r {path}")
            found[path] = None
    return list(found)


def read(files: list[Path], layout: RowLayout, field: str) -> Iterator[str | None]:
    """Yield the documents of ``files`` in order; None for a row without text.

    Args:
        files: from `find`.
        layout: how the files are written; ``text`` is a source here, too.
        field: key or column that holds the text.

    Raises:
        InputError: not UTF-8, not JSON, no such key or column, a value that is not text, another format, damage.
    """
    for path in files:
        place = Place(path)
        if layout.source == "text":
            with named(place):
                yield _text(place)
            continue
        for row in row_files.rows(place, layout, {field: "data.field"}):
            value = row[field]
            if value is not None and not isinstance(value, str):
                reason = f"holds {type(value).__name__}, not text, in {place}"
                raise InputError("data.field", field, reason, allowed="text or null")
            yield value


def _no_file(key: str, pattern: str, folders: list[Path]) -> InputError:
    if folders:
        reason = "is a folder and matches no file" if len(folders) == 1 else "matches no file, only folders"
        fix = paths.listed(key, f"{pattern.rstrip('/')}/*")
        return InputError(key, pattern, reason, fix=fix)
    expanded = os.path.expanduser(pattern)
    inside = next((str(p) for p in Path(expanded).parents if os.path.isdir(p)), ".")
    if not os.access(inside, os.R_OK | os.X_OK):
        return InputError(key, pattern, f"cannot be read (Permission denied: {inside})")
    inner = pattern.strip().removeprefix("[").removesuffix("]")
    if inner != pattern and os.path.exists(os.path.expanduser(inner)):
        # The whole list in quotes, where each path wanted its own.
        fix = paths.listed(key, inner)
        return InputError(key, pattern, "matches no file", suggestion=inner, fix=fix)
    special = [character for character in "[*?" if character in pattern]
    allowed = "an existing path, or a pattern with *, ?, [a-z], **"
    if special:
        allowed += f"; a {special[0]} that is part of a name is written [{special[0]}]"
    return InputError(key, pattern, "matches no file", allowed=allowed)


def _text(place: Place) -> str:
    fix = "split it: split -C 100M FILE PART, or write JSON lines, one document each"
    refuse_larger_than_memory(place, "one document", fix)
    opened = open_decompressed(place.path)
    with opened.file as file:
        refuse_other_formats(place, file, "text")
        data = file.read()
    try:
        return data.removeprefix(codecs.BOM_UTF8).decode("utf-8")
    except UnicodeDecodeError as error:
        raise not_utf8(place, data, error, opened.codec) from error
