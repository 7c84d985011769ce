"""Read predictions.parquet: what a run answered for each validation example at its last evaluation."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from harness.files import bounded
from harness.files.bounded import MIB, UnreadableFile

FILE = "predictions.parquet"
LIMIT = 512 * MIB
"""Largest file that is read, in bytes."""
MAX_VALUES = 50_000_000
"""Largest rows × columns; the size on disk says little about them."""
MAX_TEXT = 500
"""Characters of a generated text that are kept."""
REQUIRED = ("example", "reference", "prediction", "correct")


@dataclass(frozen=True)
class Predictions:
    """The answers of one run in the order of the examples; every field has one entry per example."""

    examples: NDArray[np.int64]
    """Row in the source."""
    references: list[str]
    predictions: list[str]
    """Class, number or extracted answer as text; empty where no answer could be extracted."""
    correct: NDArray[np.bool_] | None
    """None for numbers, which are neither right nor wrong."""
    texts: list[str] | None
    """Generated text, its beginning; None where nothing is generated."""


def read(path: Path, notes: list[str]) -> Predictions | None:
    """Return the predictions; None if there are none or the file is damaged.

    Args:
        path: of the file.
        notes: receives a line if it cannot be used.
    """
    try:
        content = bounded.read_bytes(path, LIMIT)
    except FileNotFoundError:
        return None
    except UnreadableFile as error:
        notes.append(str(error))
        return None
    try:
        return _parse(content)
    except Exception as error:  # pyarrow raises its own hierarchy, OSError and ValueError for damaged files
        notes.append(f"{FILE} cannot be read: {' '.join(str(error).split())[:200]}")
        return None


def _parse(content: bytes) -> Predictions:
    """Return the predictions sorted by example.

    Raises:
        ValueError: too large, columns are absent, or values that must be there are not.
    """
    import pyarrow.parquet as pq  # takes a while, which a command that only trains does not need

    file = pq.ParquetFile(io.BytesIO(content))
    if file.metadata.num_rows * file.metadata.num_columns > MAX_VALUES:
        raise ValueError(f"it holds more than {MAX_VALUES:,} values")
    names = file.schema_arrow.names
    if absent := [name for name in REQUIRED if name not in names]:
        raise ValueError(f"it lacks {', '.join(absent)}")
    table = file.read([*REQUIRED, *(["text"] if "text" in names else [])]).sort_by("example")
    columns = table.to_pydict()
    examples, references = columns["example"], columns["reference"]
    if None in examples or None in references:
        raise ValueError("it has rows without an example or a reference")
    if len(set(examples)) < len(examples):
        raise ValueError("it has an example twice")
    correct, texts = columns["correct"], columns.get("text", [])
    return Predictions(
        examples=np.array(examples, np.int64),
        references=[str(value) for value in references],
        predictions=["" if value is None else str(value) for value in columns["prediction"]],
        correct=None if None in correct else np.array(correct, bool),
        texts=["" if text is None else str(text)[:MAX_TEXT] for text in texts] if any(texts) else None,
    )
