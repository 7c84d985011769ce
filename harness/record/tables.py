"""Read CSV and JSONL tables in which other trainers logged their runs; docs/report.md describes the format."""

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
"""Largest table that is read, in bytes."""
ALIASES = {"val_loss": "val/loss", "train_loss": "train/loss", "seconds": "wall_s"}
"""Other spellings of metric keys."""
LOSSES = ("val/loss", "train/loss")

_NOT_FINITE = {"nan": math.nan, "inf": math.inf, "+inf": math.inf, "-inf": -math.inf, "infinity": math.inf}
_NOT_FINITE |= {"-infinity": -math.inf, "null": math.nan, "none": math.nan, "na": math.nan}


def read_rows(path: Path, complaints: list[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield number (from 1) and cells of each readable line; add a complaint for each of the others.

    Raises:
        FileNotFoundError: no such file.
        UnreadableFile: not a regular file, too large, or it cannot be opened.
    """
    text = bounded.read_text(path, LIMIT, complaints)
    for line, row in (_csv if path.suffix.lower() == ".csv" else _jsonl)(text, complaints):
        yield line, {ALIASES.get(key, key): value for key, value in row.items()}


def _csv(text: str, complaints: list[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    head = text.split("\n", 1)[0]
    reader = csv.reader(io.StringIO(text), delimiter=max(DELIMITERS, key=head.count))
    try:
        names = [name.strip() for name in next(reader, [])]
        for cells in reader:
            if not any(cell.strip() for cell in cells):
                continue
            if len(cells) != len(names):
                complaints.append(f"line {reader.line_num}: {len(cells)} cells, the header has {len(names)}")
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
            torn = " (cut off: the file ends within it)" if index == len(lines) else ""
            complaints.append(f"line {index}: not JSON{torn}")
            continue
        if not isinstance(row, dict):
            complaints.append(f"line {index}: not an object")
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


def parse_value(cell: Any) -> Any:
    """Return a cell as a number if it is one (``nan`` and ``inf`` included), else unchanged."""
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
