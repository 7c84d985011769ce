"""Files of a run folder, read so that a damaged one costs a note and never the report.

Every reader takes the list of notes of its run and adds one line for each oddity it met.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from harness.files import bounded
from harness.files.bounded import MIB, UnreadableFile
from harness.protocols import MetricRow
from harness.record import readers
from harness.record.readers import Record

if TYPE_CHECKING:
    import pandas as pd

Columns = dict[str, NDArray[np.float64]]
MOMENTS_LIMIT = 1024 * MIB
"""Bytes of a moments.parquet."""
MOMENTS_VALUES = 200_000_000
"""Rows × columns of a moments.parquet, whose size on disk says little of them."""


def number(value: object) -> float:
    """``value`` as a float; NaN for null, text, lists and all else that is no number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return math.nan
    try:
        return float(value)
    except OverflowError:  # JSON knows integers of any length
        return math.nan


def mapping(path: Path, notes: list[str], *, required: bool = False) -> dict[str, Any]:
    """A JSON or YAML file that holds one object; ``{}`` and a note if it is damaged (or required and
    absent).
    """
    content, problems = (readers.config if path.suffix == ".yaml" else readers.json_object)(path)
    notes += problems
    if content is None and not problems and required:
        notes.append(f"{path.name} is missing")
    return content or {}


def record(path: Path, kind: type[Record], notes: list[str]) -> dict[str, Any]:
    """The values of the right type in a JSON file of a known kind; ``{}`` if it is absent or damaged."""
    content, problems = readers.record(path, kind)
    notes += problems
    return {} if content is None else content.facts()


def rows(folder: Path, notes: list[str]) -> list[dict[str, Any]]:
    """The entries of parameters.json."""
    found, problems = readers.parameters(folder)
    notes += problems
    return [parameter.facts() for parameter in found]


def metrics(path: Path, notes: list[str]) -> Columns:
    """metrics.jsonl as columns of float64, one entry per step in ascending order; NaN where a row lacks the
    key.

    A run that was resumed may have logged a step twice: the later row holds.
    """
    table, problems = readers.metrics(path)
    notes += problems
    if not table:
        if not problems:
            notes.append("metrics.jsonl holds no rows" if path.exists() else "metrics.jsonl is missing")
        return {}
    by_step = {row["step"] or 0: row for row in table}
    repeated = len(table) - len(by_step)
    if repeated:
        notes.append(f"{repeated} steps were logged twice; the later row is used")
    return _columns([by_step[step] for step in sorted(by_step)], notes)


def _columns(table: Sequence[MetricRow], notes: list[str]) -> Columns:
    keys = {key for row in table for key in row}
    columns = {key: np.array([number(row.get(key)) for row in table]) for key in keys}
    for key in ("train/loss", "val/loss"):
        lost = sum(key in row and row[key] is None for row in table)
        if lost:
            notes.append(f"{key} is not finite in {lost} row{'s' if lost > 1 else ''}")
    return columns


def moments(path: Path, notes: list[str]) -> pd.DataFrame:
    """moments.parquet (step, layer, rule and the spectrum figures); an empty frame where there is none."""
    import pandas as pd  # half a second, which a command that only trains does not owe
    import pyarrow.parquet as pq

    try:
        content = bounded.read_bytes(path, MOMENTS_LIMIT)
    except FileNotFoundError:
        return pd.DataFrame()
    except UnreadableFile as error:
        notes.append(str(error))
        return pd.DataFrame()
    try:
        # Repeated values are packed so well that a file of some kB can hold a billion rows.
        shape = pq.ParquetFile(io.BytesIO(content)).metadata
        if shape.num_rows * shape.num_columns > MOMENTS_VALUES:
            notes.append(f"moments.parquet holds more than {MOMENTS_VALUES:,} values: left out")
            return pd.DataFrame()
        frame = pd.read_parquet(io.BytesIO(content))
    except Exception as error:  # pyarrow raises its own hierarchy, OSError and ValueError for damaged files
        reason = " ".join(str(error).split())[:200]
        notes.append(f"moments.parquet can't be read: {reason}")
        return pd.DataFrame()
    if not {"step", "layer"} <= set(frame.columns):
        notes.append("moments.parquet lacks step or layer")
        return pd.DataFrame()
    return frame
