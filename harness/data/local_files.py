"""Documents from local files: text (a file is a document), JSON lines and Parquet (a row is a document).

A row without text (null, or no such key where other rows have it) is None, in every source.
"""

from __future__ import annotations

import codecs
import io
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from harness.data import formats
from harness.data.formats import DamagedFile, check_expansion, codec_of, open_decompressed
from harness.errors import InputError
from harness.files import paths

MAX_LINE_BYTES = 256 * 2**20
"""Longest JSON line that is read."""
ROWS_WITHOUT_KEY = 1000
"""Rows without the text's key, from the first, after which it is taken for mistyped."""

ROWS_AT_ONCE = 16
"""Rows of Parquet decoded at once: a text of megabytes that all rows share is in the file once."""


class Place:
    """Where in a file reading has got to, for messages."""

    def __init__(self, path: Path) -> None:
        self.path, self.row = path, ""

    def __str__(self) -> str:
        return f"{self.path}{self.row}"


def find(patterns: list[str], source: str) -> list[Path]:
    """List the files that ``patterns`` (paths or globs; ``**`` and ``~`` work) name, each once.

    A path that exists is taken before it is read as a glob. Patterns keep their order, the files of one
    pattern are sorted: the same files give the same corpus on every machine, wherever they are.

    Raises:
        InputError: no pattern, one that matches no file, or something that is not a file.
    """
    if not patterns:
        raise InputError(
            "data.files",
            "[]",
            f"names no file for data.source={source}",
            fix=f"data.files=[FOLDER/*.{source}]",
        )
    found: dict[Path, None] = {}
    for pattern in patterns:
        matches = [(path, paths.kind(path)) for path in paths.expand(pattern)]
        # A pattern may match folders next to files; anything else that it matches was meant as data.
        files = [(path, kind) for path, kind in matches if kind != "is a folder"]
        if not files:
            raise _no_file(pattern, [path for path, _ in matches])
        for path, kind in files:
            if kind is not None:
                raise InputError(
                    "data.files", path, kind, fix=f"cat {path} > FILE" if "pipe" in kind else None
                )
            if not os.access(path, os.R_OK):
                raise InputError(
                    "data.files", path, "cannot be read (Permission denied)", fix=f"chmod +r {path}"
                )
            found[path] = None
    return list(found)


def read(files: list[Path], source: str, field: str) -> Iterator[str | None]:
    """Yield the documents of ``files`` in order; None for a row without text.

    Files compressed by gzip, bzip2, xz, zstd or lz4 are decompressed, whatever their names.

    Args:
        files: from `find`.
        source: ``text``, ``jsonl`` or ``parquet``.
        field: key or column that holds the text.

    Raises:
        InputError: not UTF-8, not JSON, no such key or column, a value that is not text, another format, damage.
    """
    for path in files:
        place = Place(path)
        try:
            yield from _READERS[source](place, field)
        except DamagedFile as error:
            fix = "decompress it yourself" if "bomb" in str(error) else "another copy of the file"
            raise InputError("data.files", place, str(error), fix=fix) from error
        except OSError as error:
            raise InputError("data.files", place, f"cannot be read ({error.strerror or error})") from error


def _no_file(pattern: str, folders: list[Path]) -> InputError:
    if folders:
        reason = "is a folder and matches no file" if len(folders) == 1 else "matches no file, only folders"
        fix = paths.listed("data.files", f"{pattern.rstrip('/')}/*")
        return InputError("data.files", pattern, reason, fix=fix)
    expanded = os.path.expanduser(pattern)
    inside = next((str(p) for p in Path(expanded).parents if os.path.isdir(p)), ".")
    if not os.access(inside, os.R_OK | os.X_OK):
        return InputError("data.files", pattern, f"cannot be read (Permission denied: {inside})")
    inner = pattern.strip().removeprefix("[").removesuffix("]")
    if inner != pattern and os.path.exists(os.path.expanduser(inner)):
        # The whole list in quotes, where each path wanted its own.
        fix = paths.listed("data.files", inner)
        return InputError("data.files", pattern, "matches no file", suggestion=inner, fix=fix)
    special = [character for character in "[*?" if character in pattern]
    allowed = "an existing path, or a pattern with *, ?, [a-z], **"
    if special:
        allowed += f"; a {special[0]} that is part of a name is written [{special[0]}]"
    return InputError("data.files", pattern, "matches no file", allowed=allowed)


def _text(place: Place, field: str) -> Iterator[str]:
    _refuse_larger_than_memory(place)
    opened = open_decompressed(place.path)
    with opened.file as file:
        _refuse_other_formats(place, file, "text")
        data = file.read()
    try:
        yield data.removeprefix(codecs.BOM_UTF8).decode("utf-8")
    except UnicodeDecodeError as error:
        raise _not_utf8(place, data, error, opened.codec) from error


def _jsonl(place: Place, field: str) -> Iterator[str | None]:
    opened = open_decompressed(place.path)
    with opened.file as file:
        place.row = ", line 1"
        _refuse_other_formats(place, file, "jsonl")
        keys: Iterable[str] | None = None
        first, without_key = "", 0
        seen = False
        for line in _lines(place, file):
            if not line.strip():
                continue
            row = _parse(place, line, opened.codec)
            if field in row:
                seen = True
                yield _checked(place, field, row[field])
                continue
            if keys is None:
                keys, first = list(row), str(place)
            without_key += 1
            if not seen and without_key >= ROWS_WITHOUT_KEY:
                break
            yield None
        if keys is not None and not seen:
            raise InputError("data.field", field, f"is not a key of {first}", allowed=_shown(keys))


def _lines(place: Place, file: io.BufferedReader) -> Iterator[bytes]:
    for number in itertools.count(1):
        # Before it is read: reading may fail.
        place.row = f", line {number}"
        line = file.readline(MAX_LINE_BYTES)
        if not line:
            return
        if len(line) == MAX_LINE_BYTES and not line.endswith(b"\n"):
            reason = f"is longer than {MAX_LINE_BYTES // 2**20} MiB"
            raise InputError("data.files", place, reason, allowed="one document a line")
        yield line


def _parse(place: Place, line: bytes, codec: str | None) -> dict[str, Any]:
    """Parse one line as a JSON object. JSON's own limits (depth, digits of a number) are Python's."""
    try:
        row = json.loads(line.removeprefix(codecs.BOM_UTF8).decode("utf-8"))
    except UnicodeDecodeError as error:
        raise _not_utf8(place, line, error, codec) from error
    except json.JSONDecodeError as error:
        raise InputError(
            "data.files", place, f"is not JSON ({error.msg})", fix=_one_a_line(place, line)
        ) from error
    except RecursionError as error:
        raise InputError("data.files", place, "nests lists or objects too deeply to be read") from error
    except ValueError as error:
        raise InputError("data.files", place, f"cannot be read as JSON ({error})"[:300]) from error
    if not isinstance(row, dict):
        fix = _one_a_line(place, line)
        raise InputError("data.files", place, "is not a JSON object", allowed='{"text": "…"}', fix=fix)
    return row


def _one_a_line(place: Place, line: bytes) -> str | None:
    """Return the command that converts a file with one JSON value over many lines, or with one list."""
    start = line.lstrip()[:1]
    if place.row != ", line 1" or start not in (b"[", b"{"):
        return None
    each = ".[]" if start == b"[" else "."
    return f"jq -c '{each}' {place.path} > NEW_FILE"


def _parquet(place: Place, field: str) -> Iterator[str | None]:
    with place.path.open("rb") as file:
        head = file.read(formats.HEAD_BYTES)
    if not head.startswith(b"PAR1"):
        raise _not_parquet(place, head)
    try:
        yield from _parquet_rows(place, field)
    except (InputError, DamagedFile, GeneratorExit):
        raise
    # Damaged files raise ArrowInvalid, ArrowNotImplementedError, OSError, UnicodeDecodeError, MemoryError, …
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise InputError("data.files", place, f"is not a Parquet file that can be read ({reason})") from error


def _parquet_rows(place: Place, field: str) -> Iterator[str | None]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pq.read_schema(place.path)
    if field not in schema.names:
        raise InputError("data.field", field, f"is not a column of {place}", allowed=_shown(schema.names))
    kind = schema.field(field).type
    value_kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    strings = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view, pa.types.is_null)
    if not any(is_kind(value_kind) for is_kind in strings):
        raise InputError("data.field", field, f"holds {kind}, not text, in {place}")
    size, done, row = place.path.stat().st_size, 0, 0
    options: dict[str, Any] = {"pre_buffer": False, "page_checksum_verification": True}
    with pq.ParquetFile(place.path, **options) as table:
        for group in range(table.num_row_groups):
            place.row = f", row group {group + 1}"
            # Not per column: pyarrow aborts the process over damaged statistics of a column's metadata.
            check_expansion(table.metadata.row_group(group).total_byte_size, size)
            for batch in table.iter_batches(batch_size=ROWS_AT_ONCE, row_groups=[group], columns=[field]):
                for scalar in batch.column(0):
                    row += 1
                    place.row = f", row {row}"
                    value = scalar.as_py()
                    done += len(value or "")
                    check_expansion(done, size)
                    yield value


def _not_parquet(place: Place, head: bytes) -> InputError:
    codec = codec_of(head)
    known = formats.recognize(head)
    path = str(place.path)
    if codec is not None:
        return InputError(
            "data.files",
            path,
            f"is not a Parquet file but compressed by {codec[0]}",
            fix="decompress it, or data=jsonl if it holds JSON lines",
        )
    if known is not None:
        return InputError(
            "data.files", path, f"is not a Parquet file but {known.name}", fix=_fix(known, path)
        )
    if head.lstrip()[:1] == b"{":
        fix = f"data=jsonl {paths.listed('data.files', path)}"
        return InputError("data.files", path, "is not a Parquet file (it starts like JSON lines)", fix=fix)
    return InputError("data.files", path, "is not a Parquet file (it does not start with PAR1)")


def _refuse_larger_than_memory(place: Place) -> None:
    import psutil

    size, free = place.path.stat().st_size, psutil.virtual_memory().available
    if 2 * size > free:
        reason = f"is one document of {size / 1e9:,.1f} GB, and {free / 1e9:,.1f} GB of memory are free"
        fix = "split it: split -C 100M FILE PART, or write JSON lines, one document each"
        raise InputError("data.files", place, reason, fix=fix)


def _refuse_other_formats(place: Place, file: io.BufferedReader, source: str) -> None:
    known = formats.recognize(file.peek(formats.HEAD_BYTES)[: formats.HEAD_BYTES])
    if known is not None:
        path = str(place.path)
        fix = _fix(known, path)
        raise InputError("data.files", path, f"is {known.name}, not {_NAMES[source]}", fix=fix)


def _fix(known: formats.Format, path: str) -> str:
    # An f-string of its own: a path may hold braces.
    return known.fix.replace("{file}", path)


def _not_utf8(place: Place, data: bytes, error: UnicodeDecodeError, codec: str | None) -> InputError:
    if formats.is_binary(data[: 2**20]):
        reason = f"is binary data, neither {_NAMES['text']} nor a format that is known here"
        return InputError("data.files", place, reason, allowed="UTF-8 text, JSON lines or Parquet")
    reason = f"is not UTF-8 text ({error.reason}, byte {error.start})"
    fix = f"iconv -f ENCODING -t UTF-8 {place.path} > NEW_FILE"
    if codec is not None:
        reason, fix = (
            f"holds text that is not UTF-8 ({error.reason}, byte {error.start})",
            (f"decompress it ({codec}), convert the text to UTF-8, and name the new file"),
        )
    return InputError("data.files", place, reason, fix=fix)


def _checked(place: Place, field: str, value: Any) -> str | None:
    if value is not None and not isinstance(value, str):
        kind = type(value).__name__
        raise InputError("data.field", field, f"holds {kind}, not text, in {place}", allowed="text or null")
    return value


def _shown(names: Iterable[object]) -> list[str]:
    """Return the first names, shortened, for a message: a key of a damaged file may be a megabyte long."""
    return [str(name)[:60] for name in itertools.islice(names, 20)]


_NAMES = {"text": "UTF-8 text", "jsonl": "JSON lines", "parquet": "Parquet"}
_READERS: dict[str, Callable[[Place, str], Iterator[str | None]]] = {
    "text": _text,
    "jsonl": _jsonl,
    "parquet": _parquet,
}
