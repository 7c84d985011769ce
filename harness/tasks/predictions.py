"""predictions.parquet: the result of every validation example at the last evaluation of a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from harness.files import atomic

FILE = "predictions.parquet"
SCHEMA = pa.schema(
    {
        "example": pa.int64(),
        "reference": pa.string(),
        "prediction": pa.string(),
        "correct": pa.bool_(),
        "loss": pa.float64(),
        "probability": pa.float64(),
        "text": pa.string(),
    }
)


class Prediction(NamedTuple):
    """One row.

    Attributes:
        example: row in the source of the validation data, from 0.
        reference: class, number or answer of the data.
        prediction: class, number (as `repr` writes it) or extracted answer; None: none was found.
        correct: whether they agree; None for numbers.
        loss: nats, or the squared error.
        probability: of the predicted class; None elsewhere.
        text: that was generated; None elsewhere.
    """

    example: int
    reference: str
    prediction: str | None
    correct: bool | None
    loss: float
    probability: float | None = None
    text: str | None = None


def write(folder: Path, rows: Sequence[Prediction]) -> None:
    """Write the file of a run whole or not at all.

    Args:
        folder: of the run.
        rows: of all validation examples, each once.
    """
    columns = list(zip(*rows, strict=True)) or [()] * len(SCHEMA)
    arrays = [pa.array(column, field.type) for column, field in zip(columns, SCHEMA, strict=True)]
    buffer = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_arrays(arrays, schema=SCHEMA), buffer)
    atomic.write_bytes(folder / FILE, buffer.getvalue().to_pybytes())
