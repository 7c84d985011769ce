"""Documents from local files: text (a file is a document), JSON lines and Parquet (a row is a document)."""

from __future__ import annotations

import glob
import gzip
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from harness.config.errors import InputError


def find(patterns: list[str], source: str) -> list[Path]:
    """The files that ``patterns`` (paths or globs; ``**`` and ``~`` work) name, each once.

    Patterns keep their order, the files of one pattern are sorted: the same files give the same corpus on
    every machine, wherever they lie.

    Raises:
        InputError: no pattern, or one that matches no file.
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
        expanded = str(Path(pattern).expanduser())
        matches = sorted(Path(m) for m in glob.glob(expanded, recursive=True) if Path(m).is_file())
        if not matches:
            hint = (
                f"{pattern.rstrip('/')}/*" if Path(expanded).is_dir() else "an existing path or glob pattern"
            )
            raise InputError("data.files", pattern, "matches no file", fix=f"data.files=[{hint}]")
        found.update(dict.fromkeys(matches))
    return list(found)


def read(paths: list[Path], source: str, field: str) -> Iterator[str]:
    """Documents of ``paths`` in order. ``source``: ``text``, ``jsonl`` or ``parquet``; names that end in
    ``.gz`` are decompressed. ``field``: the key or column that holds the text.

    Raises:
        InputError: not UTF-8, not JSON, no such key or column, a value that is not text, a broken file.
    """
    for path in paths:
        try:
            yield from _READERS[source](path, field)
        except UnicodeDecodeError as error:
            raise InputError(
                "data.files",
                path,
                f"is not UTF-8 text ({error.reason}, byte {error.start})",
                fix="iconv -t utf-8",
            ) from error
        except (OSError, EOFError) as error:
            raise InputError("data.files", path, f"cannot be read ({error})") from error


def _text(path: Path, field: str) -> Iterator[str]:
    with _open(path) as file:
        yield file.read().decode("utf-8")


def _jsonl(path: Path, field: str) -> Iterator[str]:
    with _open(path) as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            place = f"{path}, line {number}"
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise InputError("data.files", place, f"is not JSON ({error.msg})") from error
            if not isinstance(row, dict):
                raise InputError("data.files", place, "is not a JSON object", allowed='{"text": "…"}')
            if field not in row:
                raise InputError("data.field", field, f"is no key of {place}", allowed=row)
            if not isinstance(row[field], str):
                raise InputError(
                    "data.field", field, f"holds {type(row[field]).__name__}, not text, in {place}"
                )
            yield row[field]


def _parquet(path: Path, field: str) -> Iterator[str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.ParquetFile(path)
    except pa.ArrowInvalid as error:
        raise InputError("data.files", path, f"is not a Parquet file ({error})") from error
    with table:
        names = table.schema_arrow.names
        if field not in names:
            raise InputError("data.field", field, f"is no column of {path}", allowed=names)
        kind = table.schema_arrow.field(field).type
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
            raise InputError("data.field", field, f"holds {kind}, not text, in {path}")
        for batch in table.iter_batches(batch_size=1024, columns=[field]):
            yield from (value for value in batch.column(0).to_pylist() if value is not None)


def _open(path: Path) -> IO[bytes]:
    return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")  # type: ignore[return-value]


_READERS: dict[str, Callable[[Path, str], Iterator[str]]] = {
    "text": _text,
    "jsonl": _jsonl,
    "parquet": _parquet,
}
