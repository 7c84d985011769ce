"""A table filled in: published, predicted and measured beside each other, and what follows."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from analysis.paper.numbers import Printed
from analysis.paper.tables import PaperTable, Quantity

STATUSES = {
    "agrees": "every value of ours would be printed as published",
    "close": "not so, but within the table's tolerance",
    "differs": "outside of the tolerance, and no reason is known",
    "differs_known": "outside of the tolerance, for the reason given",
    "not_run": "only a run can tell, and there is none",
    "not_predictable": "optbench does not have the method",
}


@dataclass(frozen=True)
class Cell:
    """One figure of a table.

    Attributes:
        row, column: as in the table; the column with the quantity where the table has several.
        quantity: what the figure states.
        published: as printed.
        predicted, measured: in the same unit, or None.
        status: a key of `STATUSES`.
        reason: of the status, in words; may be empty.
        command: of the run that measures it; None where no run does.
        runs: folders that ``measured`` comes from.
    """

    row: str
    column: str
    quantity: Quantity
    published: Printed
    predicted: float | None
    measured: float | None
    status: str
    reason: str
    command: str | None
    runs: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Filled:
    """A table with all its cells.

    Attributes:
        name: of its file.
        table: as read.
        cells: in the order of rows, columns, quantities.
        remarks: runs that were looked at and are in no cell, one line each.
        runs: folder that was searched; None: none was.
    """

    name: str
    table: PaperTable
    cells: list[Cell]
    remarks: list[str]
    runs: Path | None

    @property
    def disagrees(self) -> bool:
        """A value of ours is outside the tolerance; a known reason explains that and does not mend it."""
        return any(cell.status.startswith("differs") for cell in self.cells)

    @property
    def counts(self) -> dict[str, int]:
        """Status → cells that have it, in the order of `STATUSES`."""
        found = Counter(cell.status for cell in self.cells)
        return {status: found[status] for status in STATUSES if found[status]}

    @property
    def commands(self) -> dict[str, list[str]]:
        """Command of every run that is missing → the cells it would fill."""
        missing: dict[str, list[str]] = {}
        for cell in self.cells:
            if cell.command is not None and cell.measured is None:
                missing.setdefault(cell.command, []).append(f"{cell.row}, {cell.column}")
        return missing
