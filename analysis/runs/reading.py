"""Read the files of a run folder; a damaged file adds a note and never stops the report.

Each reader takes the list of notes of its run and adds one line for each problem.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
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
PROVENANCE_FILE = "compare.json"
"""Written into a group's folder by `optbench compare`: its commands and the order of its arms."""
MOMENTS_LIMIT = 1024 * MIB
"""Largest moments.parquet that is read, in bytes."""
MOMENTS_VALUES = 200_000_000
"""Largest rows × columns of a moments.parquet; its size on disk says little about them."""


def number(value: object) -> float:
    """Return ``value`` as a float; NaN for null, text, lists and everything else that is not a number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return math.nan
    try:
        return float(value)
    except OverflowError:  # JSON knows integers of any length
        return math.nan


def mapping(path: Path, notes: list[str], *, required: bool = False) -> dict[str, Any]:
    """Read a JSON or YAML file with one object; return ``{}`` and a note if it is damaged, or required but absent."""
    content, problems = (readers.config if path.suffix == ".yaml" else readers.json_object)(path)
    notes += problems
    if content is None and not problems and required:
        notes.append(f"{path.name} is missing")
    return content or {}


def read_provenance(folder: Path) -> dict[str, list[str]]:
    """Return ``commands`` and ``optimizers`` of a group's compare.json; empty lists where they are not recorded."""
    content = mapping(folder / PROVENANCE_FILE, [])
    lists = {key: content.get(key) for key in ("commands", "optimizers")}
    return {
        key: [entry for entry in value if isinstance(entry, str)] if isinstance(value, list) else []
        for key, value in lists.items()
    }


def record(path: Path, kind: type[Record], notes: list[str]) -> dict[str, Any]:
    """Return the valid values of a JSON file of a known kind; ``{}`` if it is absent or damaged."""
    content, problems = readers.record(path, kind)
    notes += problems
    return {} if content is None else content.facts()


def parameters(folder: Path, notes: list[str]) -> list[dict[str, Any]]:
    """Return the entries of parameters.json."""
    entries, problems = readers.parameters(folder)
    notes += problems
    return [parameter.facts() for parameter in entries]


def metrics(path: Path, notes: list[str]) -> Columns:
    """Read metrics.jsonl as float64 columns, one entry per step in ascending order; NaN where a row lacks a key."""
    table, problems = readers.metrics(path)
    notes += problems
    if not table:
        if not problems:
            notes.append("metrics.jsonl holds no rows" if path.exists() else "metrics.jsonl is missing")
        return {}
    # A resumed run may have logged a step twice: the later row is used.
    by_step = {row["step"] or 0: row for row in table}
    repeated = len(table) - len(by_step)
    if repeated:
        notes.append(f"{repeated} steps were logged twice; the later row is used")
    return _columns([by_step[step] for step in sorted(by_step)], notes)


def to_columns(rows: Mapping[float, Mapping[str, float]]) -> Columns:
    """Return rows by step as columns that rise with the step, NaN where a row lacks a key."""
    if not rows:
        return {}
    steps = sorted(rows)
    keys = sorted({key for row in rows.values() for key in row})
    columns = {key: np.array([rows[step].get(key, math.nan) for step in steps]) for key in keys}
    return {"step": np.array(steps, float), **columns}


def _columns(table: Sequence[MetricRow], notes: list[str]) -> Columns:
    keys = {key for row in table for key in row}
    columns = {key: np.array([number(row.get(key)) for row in table]) for key in keys}
    for key in ("train/loss", "val/loss"):
        lost = sum(key in row and row[key] is None for row in table)
        if lost:
            notes.append(f"{key} is not finite in {lost} row{'s' if lost > 1 else ''}")
    return columns


def moments(path: Path, notes: list[str]) -> pd.DataFrame:
    """Read moments.parquet (step, layer, rule and the spectrum figures); return an empty frame if there is none."""
    import pandas as pd  # takes half a second, which a command that only trains does not need
    import pyarrow.parquet as pq

    try:
        content = bounded.read_bytes(path, MOMENTS_LIMIT)
    except FileNotFoundError:
        return pd.DataFrame()
    except UnreadableFile as error:
        notes.append(str(error))
        return pd.DataFrame()
    try:
        # Parquet compresses repeated values so well that a file of some kB can hold a billion rows.
        shape = pq.ParquetFile(io.BytesIO(content)).metadata
        if shape.num_rows * shape.num_columns > MOMENTS_VALUES:
            notes.append(f"moments.parquet holds more than {MOMENTS_VALUES:,} values: it is not read")
            return pd.DataFrame()
        frame = pd.read_parquet(io.BytesIO(content))
    except Exception as error:  # pyarrow raises its own hierarchy, OSError and ValueError for damaged files
        reason = " ".join(str(error).split())[:200]
        notes.append(f"moments.parquet cannot be read: {reason}")
        return pd.DataFrame()
    if not {"step", "layer"} <= set(frame.columns):
        notes.append("moments.parquet lacks step or layer")
        return pd.DataFrame()
    return frame
