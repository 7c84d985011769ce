"""The four tables: rows of plain values, as Parquet and CSV, whole or not at all."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from harness.files import atomic
from harness.visible import csv_cell

Row = dict[str, Any]
TABLES = ("certificate", "alternatives", "attack", "susceptibility")


def write(folder: Path, tables: Mapping[str, Sequence[Row]]) -> list[Path]:
    """Write each table as NAME.parquet and NAME.csv into an existing folder; an empty one has no columns."""
    written = []
    for name, rows in tables.items():
        frame = pd.DataFrame(list(rows))
        buffer = io.BytesIO()
        frame.to_parquet(buffer, index=False)
        for path, data in (
            (folder / f"{name}.parquet", buffer.getvalue()),
            (folder / f"{name}.csv", _safe(frame).to_csv(index=False).encode()),
        ):
            atomic.write_bytes(path, data)
            written.append(path)
    return written


def _safe(frame: pd.DataFrame) -> pd.DataFrame:
    """The texts of a table as cells that no spreadsheet evaluates."""
    return frame.map(lambda value: csv_cell(value) if isinstance(value, str) else value)
