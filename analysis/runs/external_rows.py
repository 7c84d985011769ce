"""Lines of CSV and JSONL files as mappings, with what is wrong with a line said and the rest kept."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from harness.files import bounded
from harness.files.bounded import MIB, JsonDecoder, UnreadableValue

DELIMITERS = ",;\t"
LIMIT = 512 * MIB
"""Bytes of a table."""
_NOT_FINITE = {"nan": math.nan, "inf": math.inf, "+inf": math.inf, "-inf": -math.inf, "infinity": math.inf}
_NOT_FINITE |= {"-infinity": -math.inf, "null": math.nan, "none": math.nan, "na": math.nan}
_FLAGS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


def rows(path: Path, complaints: list[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Number (from 1) and cells of each line that can be read; a complaint for each that can't.

    Raises:
        FileNotFoundError: no such file.
        UnreadableFile: it is no file, too large, or can't be opened.
    """
    text = bounded.read_text(path, LIMIT, complaints)
    yield from (_csv if path.suffix.lower() == ".csv" else _jsonl)(text, complaints)


def _csv(text: str, complaints: list[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    head = text.split("\n", 1)[0]
    reader = csv.reader(io.StringIO(text), delimiter=max(DELIMITERS, key=head.count))
    try:
        names = [name.strip() for name in next(reader, [])]
        for cells in reader:
            if not any(cell.strip() for cell in cells):
                continue
            if len(cells) != len(names):
                complaints.append(f"line {reader.line_num}: {len(cells)} cells, the head has {len(names)}")
                continue
            yield reader.line_num, dict(zip(names, (cell.strip() for cell in cells), strict=True))
    except csv.Error as error:
        complaints.append(f"line {reader.line_num}: {error}")


def _jsonl(text: str, complaints: list[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    lines, decoder = text.split("\n"), JsonDecoder()
    for index, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = decoder.decode(line)
        except UnreadableValue:
            torn = " (torn: the file ends within it)" if index == len(lines) else ""
            complaints.append(f"line {index}: no JSON{torn}")
            continue
        if not isinstance(row, dict):
            complaints.append(f"line {index}: no object")
            continue
        yield index, _flat(row)


def _flat(row: dict[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in row.items():
        if isinstance(value, dict):
            flat |= {f"{key}.{part}": entry for part, entry in value.items()}
        else:
            flat[key] = value
    return flat


def value(cell: Any) -> Any:
    """A cell as a number where it is one (``nan`` and ``inf`` too), else as it stands."""
    if not isinstance(cell, str):
        return cell
    word = cell.strip().lower()
    if word in _NOT_FINITE:
        return _NOT_FINITE[word]
    try:
        return int(word)
    except ValueError:
        pass
    try:
        return float(word)
    except ValueError:
        return cell


def flag(cell: Any) -> bool | None:
    """True or false; None if it is neither."""
    return cell if isinstance(cell, bool) else _FLAGS.get(str(cell).strip().lower())
