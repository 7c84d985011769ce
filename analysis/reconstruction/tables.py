"""The four tables: rows of plain values, as Parquet and CSV, whole or not at all."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from harness.record import atomic

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
            (folder / f"{name}.csv", frame.to_csv(index=False).encode()),
        ):
            atomic.write_bytes(path, data)
            written.append(path)
    return written
