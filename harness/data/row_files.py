"""Rows of local files: JSON lines, a JSON list, comma- or tab-separated text, Parquet. A row is a dictionary.

Each reader keeps `Place` at the row that it yields, and refuses a column that the file does not have.
"""

from __future__ import annotations

import codecs
import csv
import io
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from harness.data import formats
from harness.data.file_errors import (
    Place,
    fix_of,
    named,
    not_utf8,
    refuse_larger_than_memory,
    refuse_other_formats,
    shown,
)
from harness.data.formats import DamagedFile, check_expansion, codec_of, open_decompressed
from harness.errors import InputError
from harness.files import paths

MAX_LINE_BYTES = 256 * 2**20
"""Longest line that is read."""
ROWS_WITHOUT_KEY = 1000
"""Rows without a wanted key, from the first, after which it is taken for mistyped."""
ROWS_AT_ONCE = 16
"""Rows of Parquet decoded at once: a text of megabytes that all rows share is in the file once."""

Wanted = Mapping[str, str]
"""Column → configuration key that names it."""
DELIMITERS = {"csv": ",", "tsv": "\t"}


class RowLayout(NamedTuple):
    """How the rows of a file are written.

    Attributes:
        source: ``jsonl``, ``json``, ``csv``, ``tsv`` or ``parquet``.
        columns: for csv and tsv: names of the columns where the file has no header; None: line 1 names them.
        quotes: for csv and tsv. standard: as RFC 4180 has it; literal: quote characters are text.
    """

    source: str
    columns: Sequence[str] | None = None
    quotes: Literal["standard", "literal"] = "standard"


def rows(place: Place, layout: RowLayout, wanted: Wanted | None) -> Iterator[dict[str, Any]]:
    """Yield the rows of the file at ``place``, which is kept up to date.

    Files compressed by gzip, bzip2, xz, zstd or lz4 are decompressed, whatever their names (Parquet compresses
    inside). A row of JSON without a key that other rows of the file have is None there.

    Args:
        wanted: columns to yield; None: all.

    Raises:
        InputError: another format, damage, not UTF-8, a row that does not fit the others, a column that no row has.
    """
    with named(place):
        if layout.source == "parquet":
            yield from _parquet(place, wanted)
        elif layout.source in DELIMITERS:
            yield from _delimited(place, layout, wanted)
        else:
            read = _json if layout.source == "json" else _jsonl
            yield from _with_keys(place, read(place), wanted)


def check_columns(place: object, names: Sequence[str], wanted: Wanted, hint: str | None = None) -> None:
    """Raise InputError if a wanted column is not among ``names``, those of ``place``."""
    for name, key in wanted.items():
        if name not in names:
            raise InputError(key, name, f"is not a column of {place}", allowed=shown(names), fix=hint)


def _with_keys(
    place: Place, found: Iterator[dict[str, Any]], wanted: Wanted | None
) -> Iterator[dict[str, Any]]:
    if wanted is None:
        yield from found
        return
    unseen, keys, first = dict(wanted), None, ""
    for count, row in enumerate(found, 1):
        if keys is None:
            keys, first = list(row), str(place)
        if unseen:
            unseen = {name: key for name, key in unseen.items() if name not in row}
            if unseen and count >= ROWS_WITHOUT_KEY:
                break
        yield {name: row.get(name) for name in wanted}
    if keys is not None:
        for name, key in unseen.items():
            raise InputError(key, name, f"is not a key of {first}", allowed=shown(keys))


def _jsonl(place: Place) -> Iterator[dict[str, Any]]:
    opened = open_decompressed(place.path)
    with opened.file as file:
        place.row = ", line 1"
        refuse_other_formats(place, file, "jsonl")
        for line in _lines(place, file, "one document a line"):
            if line.strip():
                yield _parse_line(place, line, opened.codec)


def _lines(place: Place, file: io.BufferedReader, allowed: str) -> Iterator[bytes]:
    for number in itertools.count(1):
        # Before it is read: reading may fail.
        place.row = f", line {number}"
        line = file.readline(MAX_LINE_BYTES)
        if not line:
            return
        if len(line) == MAX_LINE_BYTES and not line.endswith(b"\n"):
            reason = f"is longer than {MAX_LINE_BYTES // 2**20} MiB"
            raise InputError(place.key, place, reason, allowed=allowed)
        yield line


def _parse_line(place: Place, line: bytes, codec: str | None) -> dict[str, Any]:
    """Parse one line as a JSON object. JSON's own limits (depth, digits of a number) are Python's."""
    try:
        row = _loads(place, line, codec)
    except json.JSONDecodeError as error:
        raise InputError(
            place.key, place, f"is not JSON ({error.msg})", fix=_one_a_line(place, line)
        ) from error
    if not isinstance(row, dict):
        fix = _one_a_line(place, line)
        raise InputError(place.key, place, "is not a JSON object", allowed='{"text": "…"}', fix=fix)
    return row


def _one_a_line(place: Place, line: bytes) -> str | None:
    """Return what to type for a file with one JSON value over many lines, or with one list."""
    start = line.lstrip()[:1]
    if place.row != ", line 1" or start not in (b"[", b"{"):
        return None
    return "data.source=json" if start == b"[" else f"jq -c '.' {place.path} > NEW_FILE"


def _json(place: Place) -> Iterator[dict[str, Any]]:
    refuse_larger_than_memory(
        place, "one JSON list", f"jq -c '.[]' {place.path} > FILE, and data.source=jsonl"
    )
    opened = open_decompressed(place.path)
    with opened.file as file:
        refuse_other_formats(place, file, "json")
        data = file.read()
    try:
        items = _loads(place, data, opened.codec)
    except json.JSONDecodeError as error:
        # A second value after a first one that is whole.
        is_lines = error.msg == "Extra data" and data.lstrip()[:1] == b"{"
        place.row = f", line {error.lineno}"
        fix = "data.source=jsonl" if is_lines else None
        raise InputError(place.key, place, f"is not JSON ({error.msg})", fix=fix) from error
    if not isinstance(items, list):
        inside = (
            [name for name, value in items.items() if isinstance(value, list)]
            if isinstance(items, dict)
            else []
        )
        fix = f"jq '.[\"{inside[0][:60]}\"]' {place.path} > NEW_FILE" if inside else None
        if isinstance(items, dict) and not inside:
            fix = "data.source=jsonl, if each line holds an object"
        raise InputError(place.key, place, "is not a JSON list", allowed='[{"text": "…"}, …]', fix=fix)
    for number, item in enumerate(items, 1):
        place.row = f", item {number}"
        if not isinstance(item, dict):
            raise InputError(place.key, place, "is not a JSON object", allowed='[{"text": "…"}, …]')
        yield item


def _loads(place: Place, data: bytes, codec: str | None) -> Any:
    try:
        return json.loads(data.removeprefix(codecs.BOM_UTF8).decode("utf-8"))
    except UnicodeDecodeError as error:
        raise not_utf8(place, data, error, codec) from error
    except json.JSONDecodeError:
        raise
    except RecursionError as error:
        raise InputError(place.key, place, "nests lists or objects too deeply to be read") from error
    except ValueError as error:
        raise InputError(place.key, place, f"cannot be read as JSON ({error})"[:300]) from error


def _delimited(place: Place, layout: RowLayout, wanted: Wanted | None) -> Iterator[dict[str, Any]]:
    opened = open_decompressed(place.path)
    with opened.file as file:
        place.row = ", line 1"
        refuse_other_formats(place, file, layout.source)
        lines = _text_lines(place, file, opened.codec)
        records = (_literal if layout.quotes == "literal" else _quoted)(
            place, lines, DELIMITERS[layout.source]
        )
        names = None if layout.columns is None else list(layout.columns)
        for fields in records:
            if names is None:
                names = _header(place, fields)
                place.row = ""
                check_columns(place, names, wanted or {}, _header_hint(place, layout, fields))
            elif len(fields) != len(names):
                raise _another_width(place, layout, fields, names)
            elif fields == layout.columns:
                raise InputError(
                    "data.columns",
                    ", ".join(fields),
                    f"are the names that {place} holds: the file has a header",
                    fix="data.columns=null",
                )
            else:
                row = dict(zip(names, fields))
                yield row if wanted is None else {name: row[name] for name in wanted}


def _text_lines(place: Place, file: io.BufferedReader, codec: str | None) -> Iterator[str]:
    for number, line in enumerate(_lines(place, file, "one row a line")):
        if not number:
            line = line.removeprefix(codecs.BOM_UTF8)
        try:
            yield line.decode("utf-8")
        except UnicodeDecodeError as error:
            raise not_utf8(place, line, error, codec) from error


def _literal(place: Place, lines: Iterator[str], delimiter: str) -> Iterator[list[str]]:
    for line in lines:
        text = line.removesuffix("\n").removesuffix("\r")
        if text:
            yield text.split(delimiter)


def _quoted(place: Place, lines: Iterator[str], delimiter: str) -> Iterator[list[str]]:
    # The limit is one of the process; a longer line was refused before.
    csv.field_size_limit(max(csv.field_size_limit(), MAX_LINE_BYTES))
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    while True:
        first = reader.line_num + 1
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            place.row = f", line {first}"
            raise _bad_quotes(place, error) from error
        place.row = f", line {first}"
        if not fields:
            continue
        if delimiter == "\t" and reader.line_num > first:
            _refuse_swallowed_rows(place, fields, reader.line_num)
        yield fields


def _refuse_swallowed_rows(place: Place, fields: list[str], last: int) -> None:
    """Raise InputError if a quoted field holds whole rows: its quote was text and met another one far below."""
    for field in fields:
        if any(line.count("\t") >= len(fields) - 1 for line in field.split("\n")[1:-1]) and "\t" in field:
            place.row = f"{place.row} to {last}"
            raise InputError(
                place.key,
                place,
                "are one quoted field that holds rows",
                allowed="quotes around whole fields, or quotes as text",
                fix="data.quotes=literal, if the quote characters are text",
            )


def _bad_quotes(place: Place, error: csv.Error) -> InputError:
    reason = str(error)
    if "new-line character" in reason:
        fix = f"tr '\\r' '\\n' < {place.path} > NEW_FILE"
        return InputError(place.key, place, "holds a carriage return inside a line", fix=fix)
    if "unexpected end" in reason:
        reason = "opens a quote that never closes"
    elif "expected after" in reason:
        reason = "has text after a closing quote"
    fix = "data.quotes=literal, if the quote characters are text"
    return InputError(place.key, place, reason, allowed='fields in quotes, a quote in them as ""', fix=fix)


def _header(place: Place, fields: list[str]) -> list[str]:
    double = next((name for name in fields if fields.count(name) > 1), None)
    if double is not None:
        reason = f"names the column {double[:60]!r} twice"
        fix = "data.columns=[NAME, …] names the columns, if the file has no header"
        raise InputError(place.key, place, reason, fix=fix)
    return fields


def _header_hint(place: Place, layout: RowLayout, fields: list[str]) -> str:
    if len(fields) == 1:
        for source, delimiter in DELIMITERS.items():
            if delimiter in fields[0] and source != layout.source:
                return f"data.source={source}"
        if ";" in fields[0]:
            character = "commas" if layout.source == "csv" else "tabs"
            return f"the fields are separated by ; in this file: write it with {character}"
    names = ",".join(f"c{number}" for number in range(1, len(fields) + 1))
    return f"data.columns=[{names}] names the columns, if the file has no header"


def _another_width(place: Place, layout: RowLayout, fields: list[str], names: list[str]) -> InputError:
    whose = "data.columns" if layout.columns is not None else "the header"
    reason = f"has {len(fields)} field{'s' * (len(fields) != 1)}, and {whose} has {len(names)}"
    if layout.quotes == "standard" and any('"' in field for field in fields):
        fix = "data.quotes=literal, if the quote characters are text"
    elif len(fields) > len(names) and layout.quotes == "standard":
        character = "comma" if layout.source == "csv" else "tab"
        fix = f"quotes around fields that hold a {character}"
    else:
        fix = None
    return InputError(place.key, place, reason, fix=fix)


def _parquet(place: Place, wanted: Wanted | None) -> Iterator[dict[str, Any]]:
    with place.path.open("rb") as file:
        head = file.read(formats.HEAD_BYTES)
    if not head.startswith(b"PAR1"):
        raise _not_parquet(place, head)
    try:
        yield from _parquet_rows(place, wanted)
    except (InputError, DamagedFile, GeneratorExit):
        raise
    # Damaged files raise ArrowInvalid, ArrowNotImplementedError, OSError, UnicodeDecodeError, MemoryError, …
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise InputError(place.key, place, f"is not a Parquet file that can be read ({reason})") from error


def _parquet_rows(place: Place, wanted: Wanted | None) -> Iterator[dict[str, Any]]:
    import pyarrow.parquet as pq

    schema = pq.read_schema(place.path)
    check_columns(place, schema.names, wanted or {})
    names = list(schema.names if wanted is None else wanted)
    for name in names:
        _check_type(place, name, schema.field(name).type, (wanted or {}).get(name, place.key))
    size, done, number = place.path.stat().st_size, 0, 0
    options: dict[str, Any] = {"pre_buffer": False, "page_checksum_verification": True}
    with pq.ParquetFile(place.path, **options) as table:
        for group in range(table.num_row_groups):
            place.row = f", row group {group + 1}"
            # Not per column: pyarrow aborts the process over damaged statistics of a column's metadata.
            check_expansion(table.metadata.row_group(group).total_byte_size, size)
            for batch in table.iter_batches(batch_size=ROWS_AT_ONCE, row_groups=[group], columns=names):
                for row in zip(*(batch.column(name) for name in names)):
                    number += 1
                    place.row = f", row {number}"
                    values = [scalar.as_py() for scalar in row]
                    done += sum(len(value) for value in values if isinstance(value, str))
                    check_expansion(done, size)
                    yield dict(zip(names, values))


def _check_type(place: Place, name: str, kind: Any, key: str) -> None:
    import pyarrow as pa

    value_kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    types = pa.types
    strings = (types.is_string, types.is_large_string, types.is_string_view, types.is_null)
    numbers = (types.is_boolean, types.is_integer, types.is_floating)
    if not any(is_kind(value_kind) for is_kind in (*strings, *numbers)):
        raise InputError(key, name, f"holds {kind}, not text or numbers, in {place}")


def _not_parquet(place: Place, head: bytes) -> InputError:
    codec = codec_of(head)
    known = formats.recognize(head)
    path = str(place.path)
    if codec is not None:
        return InputError(
            place.key,
            path,
            f"is not a Parquet file but compressed by {codec[0]}",
            fix="decompress it, or data=jsonl if it holds JSON lines",
        )
    if known is not None:
        return InputError(place.key, path, f"is not a Parquet file but {known.name}", fix=fix_of(known, path))
    if head.lstrip()[:1] == b"{":
        fix = f"data=jsonl {paths.listed(place.key, path)}"
        return InputError(place.key, path, "is not a Parquet file (it starts like JSON lines)", fix=fix)
    return InputError(place.key, path, "is not a Parquet file (it does not start with PAR1)")
