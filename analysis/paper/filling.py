"""From a table's file to its cells: compose each cell's run, count it, look for it among finished ones, judge."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from analysis.paper import evidence, tables
from analysis.paper.cells import Cell, Filled
from analysis.paper.counting import Counted, count
from analysis.paper.evidence import Chosen, Finished
from analysis.paper.judging import Value, judge
from analysis.paper.numbers import Printed
from analysis.paper.tables import PaperTable, Quantity
from harness.config import checks, compose
from harness.config.overrides import leaves
from harness.config.schema import RunConfig
from harness.errors import InputError

_BUFFERS = 1e-3
"""Share of the weights that a model's buffers (rotary frequencies) may be: the plan counts parameters only."""


def fill(name: str, runs: Path | None = None) -> Filled:
    """Predict every cell that can be predicted, and look for runs of all that a run can fill.

    Args:
        name: of the table.
        runs: folder of finished runs; None: nothing is measured.

    Raises:
        InputError: no such table or folder, or a table with words that no run takes.
    """
    table = tables.load(name)
    finished, remarks = evidence.read(runs) if runs is not None else ([], [])
    places = [
        _place(name, table, row, column)
        for row in table.rows
        for column in table.columns
        if table.published(row, column)
    ]
    cells: list[Cell] = []
    taken: list[Finished] = []
    for place in places:
        matching = place.matching(finished)
        taken += matching
        counted, chosen = place.counted(), evidence.choose(matching, table.rows[place.row].unstated)
        cells += [
            place.cell(quantity, printed, counted, chosen)
            for quantity, printed in table.published(place.row, place.column).items()
        ]
    targets = [place.target for place in places if place.target is not None]
    remarks += [evidence.remark(run, targets) for run in finished if run not in taken]
    return Filled(name, table, cells, remarks, runs)


@dataclass(frozen=True)
class _Place:
    """A row and a column: one run, which may fill a cell for each quantity."""

    name: str
    table: PaperTable
    row: str
    column: str
    config: RunConfig | None
    """Of the run, on one process; None: the method is not ours."""

    @property
    def target(self) -> evidence.Target | None:
        """What a finished run must be to stand here; None where no run can."""
        kinds = {self.table.quantities[q].kind for q in self.table.published(self.row, self.column)}
        if self.config is None or kinds == {"state_numbers"}:
            return None
        return evidence.Target(f"{self.row}, {self.column}", self.config, self.table.rows[self.row].unstated)

    def matching(self, finished: Sequence[Finished]) -> list[Finished]:
        return [run for run in finished if not self.target.differences(run)] if self.target else []

    def counted(self) -> Counted | None:
        kinds = {self.table.quantities[q].kind for q in self.table.published(self.row, self.column)}
        return None if self.config is None or kinds == {"perplexity"} else count(self.config)

    def cell(self, name: str, printed: Printed, counted: Counted | None, chosen: Chosen | None) -> Cell:
        """The cell of one quantity."""
        row, quantity = self.table.rows[self.row], self.table.quantities[name]
        predicted = self._predicted(quantity, counted)
        measured = chosen.measured(quantity) if chosen else None
        values = [] if predicted is None else [Value(predicted, self._known(name, predicted))]
        notes: list[str] = []
        if chosen and measured is not None:
            values.append(Value(measured, _held(chosen, measured, quantity)))
            notes.append(chosen.note)
        status, reasons = judge(printed, values, quantity.tolerance)
        notes += [*reasons, row.note or ""]
        if row.absent is not None:
            status, notes = "not_predictable", [row.absent]
        several = len(self.table.quantities) > 1
        return Cell(
            row=self.row,
            column=f"{self.column} {name}" if several else self.column,
            quantity=quantity,
            published=printed,
            predicted=predicted,
            measured=measured,
            status=status,
            reason="; ".join(filter(None, notes)),
            command=self._command() if quantity.kind == "perplexity" and row.words else None,
            runs=[found.run.where for found in chosen.runs] if chosen and measured is not None else [],
        )

    def _command(self) -> str:
        words = self.table.run_words(self.row, self.column)
        return shlex.join(["optbench", "train", *words, f"group={self.name}"])

    def _predicted(self, quantity: Quantity, counted: Counted | None) -> float | None:
        if counted is None or quantity.kind == "perplexity":
            return None
        if quantity.kind == "memory":
            return counted.memory(quantity)
        column = self.table.columns[self.column]
        try:
            shape, numbers = counted.matrix(column.parameter or "")
        except ValueError as error:
            raise _wrong(self.name, f"column {self.column}", str(error)) from None
        stated = sorted(column.values[side] for side in ("m", "n") if side in column.values)
        if stated and stated != sorted(shape):
            sides = " and ".join(
                f"{side}={column.values[side]}" for side in ("m", "n") if side in column.values
            )
            what = f"has {sides}; {column.parameter} is {' × '.join(map(str, shape))}"
            raise _wrong(self.name, f"column {self.column}", what)
        return float(numbers)

    def _known(self, quantity: str, predicted: float) -> str | None:
        """The reason that the file gives for this very prediction."""
        for known in self.table.rows[self.row].known:
            is_here = (known.column, known.quantity) == (self.column, quantity)
            if is_here and Printed.of(known.predicted).grade(predicted, 0.0) == "agrees":
                return known.reason
        return None


def _place(name: str, table: PaperTable, row: str, column: str) -> _Place:
    try:
        words = table.run_words(row, column)
    except ValueError as error:
        raise _wrong(name, f"row {row}", str(error)) from None
    if not words:
        return _Place(name, table, row, column, None)
    try:
        # How many processes there are changes no result; one process holds everything.
        config = checks.check(compose.load([*words, "world_size=1"]), environ={}, devices=0)
    except InputError as error:
        reason = f"{error.reason} (row {row}, column {column} of {tables.path_of(name)})"
        raise InputError(
            error.key, error.value, reason, allowed=error.allowed, suggestion=error.suggestion, fix=error.fix
        ) from None
    keys = leaves("", config.model_dump(mode="json"))
    for key in table.rows[row].unstated:
        if key not in keys:
            raise _wrong(name, f"row {row}", f"has {key} as unstated, which is no key of its run")
    return _Place(name, table, row, column, config)


def _held(chosen: Chosen, measured: float, quantity: Quantity) -> str | None:
    """Why measured memory is another one than the table counts: optbench's dtypes, if the plan says the same."""
    counted = count(chosen.runs[0].config) if quantity.kind == "memory" else None
    if counted is None:
        return None
    held = counted.held_memory(quantity)
    is_as_planned = math.isclose(measured, held, rel_tol=_BUFFERS)
    if not is_as_planned or math.isclose(held, counted.memory(quantity), rel_tol=_BUFFERS):
        return None
    return "the run holds what optbench plan says: optbench keeps optimizer state in fp32"


def _wrong(name: str, place: str, what: str) -> InputError:
    path = tables.path_of(name)
    return InputError(f"{path}", place, what, fix=f"correct {path}")
