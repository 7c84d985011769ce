"""Fill a table: compose the run of each cell, count its memory, find it among finished runs, and judge."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from analysis.paper import evidence, tables
from analysis.paper.cells import FilledTable, OwnValue, PaperCell, judge
from analysis.paper.evidence import FinishedRun, MatchingRuns
from analysis.paper.tables import Accounting, PaperTable, PrintedNumber, Quantity
from harness import model
from harness.config import checks, compose
from harness.config.model_facts import full_config
from harness.config.overrides import leaves
from harness.config.schema import RunConfig
from harness.errors import InputError
from harness.model import ClassificationHead
from harness.plan.simulated_rank import PlannedRank, held_bytes, simulate
from harness.tasks.metrics import METRICS

_MEASURED_ONLY = ("perplexity", "metric", "hours")
_ELSEWHERE = "hours of another machine; only ratios of two rows can be compared"
_PLAUSIBLE_SEEDS = 20
_BUFFERS = 1e-3
"""Largest share of buffers (rotary frequencies) in the weights; the plan counts parameters only."""


def fill(name: str, runs: Path | None = None) -> FilledTable:
    """Predict every cell that can be predicted, and search runs for the cells that a run can fill.

    Args:
        name: of the table.
        runs: folder of finished runs; None: nothing is measured.

    Raises:
        InputError: no such table or folder, or a table with overrides that no run accepts.
    """
    table = tables.load(name)
    finished, remarks = evidence.read(runs) if runs is not None else ([], [])
    slots = [
        _make_slot(name, table, row, column)
        for row in table.rows
        for column in table.columns
        if table.published(row, column)
    ]
    cells: list[PaperCell] = []
    used: list[FinishedRun] = []
    for slot in slots:
        matching = slot.matching(finished)
        used += matching
        counted = slot.counted()
        metric = table.columns[slot.column].metric
        matched = evidence.select_setting(matching, table.any_value(slot.row), metric)
        cells += [
            slot.cell(quantity, printed, counted, matched)
            for quantity, printed in table.published(slot.row, slot.column).items()
        ]
    targets = [slot.target for slot in slots if slot.target is not None]
    remarks += [evidence.remark(run, targets) for run in finished if run not in used]
    return FilledTable(name, table, cells, remarks, [*table.notes, *_spreads(table)], runs)


@dataclass(frozen=True)
class _RunSlot:
    """A row and a column: one run, which may fill one cell per quantity."""

    name: str
    table: PaperTable
    row: str
    column: str
    config: RunConfig | None
    """Of the run on one process; None for a method that optbench does not have."""

    @property
    def target(self) -> evidence.TargetRun | None:
        """The run that fills these cells; None if no run can."""
        kinds = {self.table.quantities[q].kind for q in self.table.published(self.row, self.column)}
        if self.config is None or kinds == {"state_numbers"}:
            return None
        inputs = [override.partition("=")[0] for override in self.table.inputs_of(self.column)]
        return evidence.TargetRun(
            f"{self.row}, {self.column}",
            self.config,
            self.table.any_value(self.row),
            inputs,
            self.table.columns[self.column].examples,
        )

    def matching(self, finished: Sequence[FinishedRun]) -> list[FinishedRun]:
        return [run for run in finished if not self.target.differences(run)] if self.target else []

    def counted(self) -> CountedRun | None:
        kinds = {self.table.quantities[q].kind for q in self.table.published(self.row, self.column)}
        return None if self.config is None or kinds <= set(_MEASURED_ONLY) else count(self.config)

    def cell(
        self, name: str, printed: PrintedNumber, counted: CountedRun | None, runs: MatchingRuns | None
    ) -> PaperCell:
        """Return the cell of one quantity."""
        row, quantity = self.table.rows[self.row], self.table.quantities[name]
        predicted = self._predicted(name, counted)
        found = runs.measured(quantity, self.table.columns[self.column]) if runs else None
        measured = found.value if found is not None else None
        values = [] if predicted is None else [OwnValue(predicted, self._known(name, predicted))]
        notes: list[str] = []
        if runs and measured is not None:
            is_time = quantity.kind == "hours"
            reason = _ELSEWHERE if is_time else _memory_reason(runs, measured, quantity)
            values.append(OwnValue(measured, reason))
            notes.append(runs.note)
        status, reasons = judge(printed, values, quantity.tolerance)
        notes += [*reasons, row.note or ""]
        if row.absent is not None:
            status, notes = "not_predictable", [row.absent]
        several = len(self.table.quantities) > 1
        return PaperCell(
            row=self.row,
            column=f"{self.column} {name}" if several else self.column,
            quantity=quantity,
            published=printed,
            predicted=predicted,
            measured=measured,
            status=status,
            reason="; ".join(filter(None, notes)),
            command=self._command() if quantity.kind in _MEASURED_ONLY and row.words else None,
            measured_std=found.std if found is not None else None,
            runs=[finished.run.where for finished in runs.runs] if runs and measured is not None else [],
        )

    def _command(self) -> str:
        inputs = self.table.inputs_of(self.column)
        replaced = tuple(override.partition("=")[0] + "=" for override in inputs)
        own = [w for w in self.table.run_words(self.row, self.column) if not w.startswith(replaced)]
        words = [*own, *inputs]
        return shlex.join(["optbench", "train", *words, f"group={self.name}"])

    def _predicted(self, name: str, counted: CountedRun | None) -> float | None:
        quantity = self.table.quantities[name]
        if counted is None or quantity.kind in _MEASURED_ONLY:
            return None
        if quantity.kind == "memory":
            return quantity.in_unit(counted.memory(self.table.accounting(self.row, name)))
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
        """Return the reason that the table's file states for this prediction."""
        for known in self.table.rows[self.row].known:
            is_here = (known.column, known.quantity) == (self.column, quantity)
            if is_here and PrintedNumber.of(known.predicted).grade(predicted, 0.0) == "agrees":
                return known.reason
        return None


def _make_slot(name: str, table: PaperTable, row: str, column: str) -> _RunSlot:
    try:
        words = table.run_words(row, column)
    except ValueError as error:
        raise _wrong(name, f"row {row}", str(error)) from None
    if not words:
        return _RunSlot(name, table, row, column, None)
    try:
        # How many processes there are changes no result; one process holds everything.
        composed = compose.load([*words, "world_size=1"])
        # A row in TF32 is of a run on a GPU; all others are of runs on any machine.
        config = checks.check(composed, environ={}, devices=1 if composed.tf32 else 0)
    except InputError as error:
        reason = f"{error.reason} (row {row}, column {column} of {tables.path_of(name)})"
        raise InputError(
            error.key, error.value, reason, allowed=error.allowed, suggestion=error.suggestion, fix=error.fix
        ) from None
    keys = leaves("", config.model_dump(mode="json"))
    for key in table.any_value(row):
        if key not in keys:
            raise _wrong(name, f"row {row}", f"has {key} as unstated, which is not a key of its run")
    return _RunSlot(name, table, row, column, config)


def _spreads(table: PaperTable) -> list[str]:
    """Return a note for each column whose standard deviations no small number of runs can have.

    With one of n examples answered differently in one of k runs, the standard deviation over these runs is
    (100 / n) / √k points; no smaller one but 0 exists.
    """
    notes = []
    for name, column in table.columns.items():
        metric = METRICS.get(column.metric or "")
        cells = (table.published(row, name).values() for row in table.rows)
        printed = [number.std for inside in cells for number in inside if number.std]
        if metric is None or not metric.is_mean or column.examples is None or not printed:
            continue
        step = 100.0 / column.examples
        runs = [math.ceil((step / std) ** 2) for std in (max(printed), min(printed))]
        if runs[0] > _PLAUSIBLE_SEEDS:
            notes.append(
                f"{name}: one of {column.examples} examples is {step:.3f} points, so a standard deviation over "
                f"runs of {max(printed):g} takes at least {runs[0]} runs, one of {min(printed):g} at least {runs[1]}"
            )
    return notes


def _memory_reason(runs: MatchingRuns, measured: float, quantity: Quantity) -> str | None:
    """Return the reason for a memory that differs from the table: optbench's dtypes, if the plan predicts it."""
    counted = count(runs.runs[0].config) if quantity.kind == "memory" else None
    if counted is None:
        return None
    held = counted.held_memory(quantity)
    is_as_planned = math.isclose(measured, held, rel_tol=_BUFFERS)
    if not is_as_planned or math.isclose(held, quantity.in_unit(counted.memory(quantity)), rel_tol=_BUFFERS):
        return None
    return "the run holds what optbench plan predicts: optbench keeps optimizer state in fp32"


def _wrong(name: str, place: str, what: str) -> InputError:
    path = tables.path_of(name)
    return InputError(f"{path}", place, what, fix=f"correct {path}")


@dataclass(frozen=True)
class CountedRun:
    """Memory of one process, which holds everything with ``single`` and ``ddp``.

    Counted on the real optimizer over meta tensors, without memory or training.

    Attributes:
        planned: model and optimizer.
        held: kind → bytes between two steps in the dtypes that optbench uses, as in `optbench plan`.
    """

    planned: PlannedRank
    held: dict[str, int]

    def memory(self, accounting: Accounting) -> int:
        """Return the bytes with the table's bytes per number, whatever dtype optbench uses."""
        parameters = dict(self.planned.network.named_parameters())
        ruled = {route.name for route in self.planned.optimizer.routes if route.rule != "adamw"}
        low_rank = [p for name, p in parameters.items() if name in ruled or _is_of_adapter(name)]
        numbers = {
            "weights": sum(p.numel() for p in parameters.values()),
            "state": sum(self._state(p) for p in parameters.values()),
            "low_rank_state": sum(map(self._state, low_rank)),
        }
        own = accounting.bytes_per_number
        width = {"weights": own, "state": accounting.bytes_per_state_number or own}
        return sum(numbers[part] * width.get(part, width["state"]) for part in accounting.counts)

    def held_memory(self, quantity: Quantity) -> float:
        """Return the memory of the same kinds in optbench's dtypes, as in `optbench plan`."""
        state = sum(size for kind, size in self.held.items() if kind.startswith("optimizer/"))
        sizes = {"weights": self.held["weights"], "state": state}
        return quantity.in_unit(sum(sizes[kind] for kind in quantity.counts))

    def matrix(self, name: str) -> tuple[tuple[int, ...], int]:
        """Return the shape of a parameter and the number of values in its state.

        Raises:
            ValueError: the model has no parameter of this name.
        """
        parameters = dict(self.planned.network.named_parameters())
        if name not in parameters:
            raise ValueError(f"the model has no parameter {name}")
        return tuple(parameters[name].shape), self._state(parameters[name])

    def _state(self, parameter: torch.nn.Parameter) -> int:
        state = self.planned.optimizer.state[parameter]
        return sum(value.numel() for value in state.values() if isinstance(value, torch.Tensor))


def _head(config: RunConfig) -> ClassificationHead | None:
    """Return what a classifier of two classes, or a regression, ends in: other numbers of classes change little."""
    if config.task.name != "classify":
        return None
    pad = full_config(config.model).get("pad_token_id")
    return ClassificationHead(None if config.task.target == "number" else ("0", "1"), pad_id=pad or 0)


def _is_of_adapter(name: str) -> bool:
    return ".lora_" in name


def count(config: RunConfig) -> CountedRun | None:
    """Count rank 0 of a checked configuration; None for an optimizer by import path, which cannot be planned."""
    if config.optimizer.target is not None:
        return None
    module = model.build(
        config.model,
        seed=0,
        precision=config.precision,
        device="meta",
        trust_remote_code=config.trust_remote_code,
        head=_head(config),
    )
    planned = simulate(config, module, 0)
    return CountedRun(planned, held_bytes(config, planned))
