"""Files of a run folder, read so that a damaged one costs a note and never the report.

Every reader takes the list of notes of its run and adds one line for each oddity it met.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml
from numpy.typing import NDArray

if TYPE_CHECKING:
    import pandas as pd

Columns = dict[str, NDArray[np.float64]]


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
    if not path.is_file():
        if required:
            notes.append(f"{path.name} is missing")
        return {}
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
        data = yaml.safe_load(text) if path.suffix == ".yaml" else json.loads(text)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        notes.append(f"{path.name} can't be read: {str(error).splitlines()[0]}")
        return {}
    if not isinstance(data, dict):
        notes.append(f"{path.name} holds no object")
        return {}
    return data


def rows(path: Path, notes: list[str]) -> list[dict[str, Any]]:
    """A JSON file that holds a list of objects (parameters.json)."""
    if not path.is_file():
        return []
    try:
        data = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except (OSError, ValueError, RecursionError) as error:
        notes.append(f"{path.name} can't be read: {str(error).splitlines()[0]}")
        return []
    kept = [row for row in data if isinstance(row, dict)] if isinstance(data, list) else []
    if not isinstance(data, list) or len(kept) < len(data):
        notes.append(f"{path.name} holds something else than a list of objects")
    return kept


def metrics(path: Path, notes: list[str]) -> Columns:
    """metrics.jsonl as columns of float64, one entry per step in ascending order; NaN where a row lacks the
    key.

    A run that was resumed may have logged a step twice: the later row holds.
    """
    if not path.is_file():
        notes.append("metrics.jsonl is missing")
        return {}
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        notes.append(f"metrics.jsonl can't be read: {error}")
        return {}
    parsed: dict[float, Mapping[str, Any]] = {}
    torn: list[int] = []
    repeated = 0
    for index, line in enumerate(lines):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            torn.append(index)
            continue
        step = number(row.get("step")) if isinstance(row, dict) else math.nan
        if not math.isfinite(step):
            torn.append(index)
            continue
        repeated += step in parsed
        parsed[step] = row
    if torn == [len(lines) - 1]:
        notes.append("the last line of metrics.jsonl is torn (the run was killed while writing it)")
    elif torn:
        notes.append(f"{len(torn)} lines of metrics.jsonl can't be read")
    if repeated:
        notes.append(f"{repeated} steps were logged twice; the later row is used")
    if not parsed:
        notes.append("metrics.jsonl holds no rows")
        return {}
    return _columns([parsed[step] for step in sorted(parsed)], notes)


def _columns(table: list[Mapping[str, Any]], notes: list[str]) -> Columns:
    keys = {key for row in table for key in row}
    columns = {key: np.array([number(row.get(key)) for row in table]) for key in keys}
    for key in ("train/loss", "val/loss"):
        lost = sum(key in row and not math.isfinite(number(row[key])) for row in table)
        if lost:
            notes.append(f"{key} is not finite in {lost} row{'s' if lost > 1 else ''}")
    return columns


def moments(path: Path, notes: list[str]) -> pd.DataFrame:
    """moments.parquet (step, layer, rule and the spectrum figures); an empty frame where there is none."""
    import pandas as pd  # half a second, which a command that only trains does not owe

    if not path.is_file():
        return pd.DataFrame()
    try:
        frame = pd.read_parquet(path)
    except Exception as error:  # pyarrow raises its own hierarchy, OSError and ValueError for damaged files
        notes.append(f"moments.parquet can't be read: {str(error).splitlines()[0]}")
        return pd.DataFrame()
    if not {"step", "layer"} <= set(frame.columns):
        notes.append("moments.parquet lacks step or layer")
        return pd.DataFrame()
    return frame
