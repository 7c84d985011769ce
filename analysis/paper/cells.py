"""A filled table: published, predicted and measured values of each cell, and their agreement."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from analysis.paper.tables import Grade, PaperTable, PrintedNumber, Quantity

STATUSES = {
    "agrees": "every value of optbench rounds to the published value",
    "close": "not printed the same, but within the table's tolerance",
    "differs": "outside of the tolerance, and no reason is known",
    "differs_known": "outside of the tolerance, for the reason given",
    "not_run": "requires a run, and there is none",
    "not_predictable": "optbench does not have the method",
}


@dataclass(frozen=True)
class PaperCell:
    """One number of a table.

    Attributes:
        row, column: as in the table; the column with the quantity where the table has several.
        quantity: what the number states.
        published: as printed.
        predicted, measured: in the same unit, or None.
        measured_std: standard deviation over the seeds of ``measured``; None for fewer than two.
        status: a key of `STATUSES`.
        reason: of the status; may be empty.
        command: of the run that measures it; None where no run does.
        runs: folders from which ``measured`` was read.
    """

    row: str
    column: str
    quantity: Quantity
    published: PrintedNumber
    predicted: float | None
    measured: float | None
    status: str
    reason: str
    command: str | None
    measured_std: float | None = None
    runs: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class FilledTable:
    """A table with all its cells.

    Attributes:
        name: of its file.
        table: as read.
        cells: in the order of rows, columns, quantities.
        remarks: one line for each run that was read and is in no cell.
        notes: of the file, and computed ones.
        runs: folder that was searched; None without one.
    """

    name: str
    table: PaperTable
    cells: list[PaperCell]
    remarks: list[str]
    notes: list[str]
    runs: Path | None

    @property
    def disagrees(self) -> bool:
        """True if a value of ours is outside of the tolerance, with or without a known reason."""
        return any(cell.status.startswith("differs") for cell in self.cells)

    @property
    def counts(self) -> dict[str, int]:
        """Status → number of cells, in the order of `STATUSES`."""
        counts = Counter(cell.status for cell in self.cells)
        return {status: counts[status] for status in STATUSES if counts[status]}

    @property
    def commands(self) -> dict[str, list[str]]:
        """Command of each missing run → the cells that it would fill."""
        missing: dict[str, list[str]] = {}
        for cell in self.cells:
            if cell.command is not None and cell.measured is None:
                missing.setdefault(cell.command, []).append(f"{cell.row}, {cell.column}")
        return missing


_ORDER: tuple[Grade, ...] = ("agrees", "close", "differs")


class OwnValue(NamedTuple):
    """A value of ours, with the known reason for a difference.

    Attributes:
        number: predicted or measured.
        reason: known for exactly this number; None without one.
    """

    number: float
    reason: str | None


def judge(published: PrintedNumber, values: Sequence[OwnValue], tolerance: float) -> tuple[str, list[str]]:
    """Return the status of a cell by its worst value, and the reasons of the values that differ.

    Args:
        published: as printed.
        values: predicted and measured, as far as they exist.
        tolerance: relative.

    Returns:
        ``not_run`` without values; ``differs_known`` only if every value that differs has a known reason.
    """
    if not values:
        return "not_run", []
    grades = [published.grade(value.number, tolerance) for value in values]
    differing = [value for value, grade in zip(values, grades, strict=True) if grade == "differs"]
    reasons = [value.reason for value in differing if value.reason is not None]
    if differing and len(reasons) == len(differing):
        return "differs_known", reasons
    return max(grades, key=_ORDER.index), reasons
