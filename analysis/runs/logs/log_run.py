"""One run as a public log records it, and the reader interface of all formats.

A reader takes the text of one file and returns the runs in it. It drops nothing silently: each line that it expects
and cannot read becomes a note.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from analysis.runs.reading import Columns
from harness.files import bounded
from harness.files.bounded import MIB

LIMIT = 512 * MIB
"""Largest log that is read, in bytes."""


@dataclass(frozen=True)
class Provenance:
    """The file that a run was read from."""

    path: Path
    sha256: str
    size: int
    """Bytes."""
    format: str


@dataclass(frozen=True)
class LogRun:
    """One run of a log.

    Attributes:
        columns: metric key of `harness.record.schema.METRICS` (or ``val/bits_per_byte``) → float64 array, one entry
            per logged step, in the order of ``step``, which rises; NaN where a row lacks the key.
        settings: what the log states about the run's settings, by dotted key.
        planned: steps that the log announces; NaN if it does not.
        optimizer: name of the optimizer; None where the log does not state it.
        seed: None where the log does not state it, so that runs of two arms cannot be paired.
        diverged: the last validation loss that the log states is not finite.
        notes: one line for each part that was not read.
        provenance: the file.
    """

    columns: Columns
    provenance: Provenance
    settings: Mapping[str, Any] = field(default_factory=dict)
    planned: float = math.nan
    optimizer: str | None = None
    seed: int | None = None
    diverged: bool = False
    notes: tuple[str, ...] = ()

    @property
    def last_step(self) -> float:
        """Last step with a row; NaN without rows."""
        steps = self.columns.get("step")
        return float(steps[-1]) if steps is not None and len(steps) else math.nan

    def rows(self) -> set[tuple[float, ...]]:
        """Return step, losses and seconds of each row, by which two logs of one run are recognized."""
        keys = ("step", "val/loss", "val/bits_per_byte", "train/loss", "wall_s")
        present = [self.columns[key] for key in keys if key in self.columns]
        table = np.column_stack(present) if present else np.empty((0, 0))
        return {tuple(-1.0 if math.isnan(value) else float(value) for value in row) for row in table}


Reader = Callable[[str, Provenance], list[LogRun]]
"""Text of a file and where it is from → the runs in it, in order; empty if the file is of another format."""


def read_file(path: Path, name: str, reader: Reader) -> list[LogRun]:
    """Read one file with the reader of format ``name``.

    Raises:
        FileNotFoundError: no such file.
        UnreadableFile: not a regular file, too large, or it cannot be opened.
    """
    content = bounded.read_bytes(path, LIMIT)
    provenance = Provenance(path, hashlib.sha256(content).hexdigest(), len(content), name)
    return reader(content.decode("utf-8", "replace"), provenance)
