"""The files of configs/paper: the numbers that a table prints, under which protocol, and from which source.

Torch-free.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from harness.config import sources, yaml_files
from harness.errors import InputError, closest
from harness.tasks.metrics import METRICS

GROUP = "paper"
BYTES = {"GiB": 2.0**30, "MiB": 2.0**20, "GB": 1e9, "MB": 1e6}
"""Unit of memory → bytes."""
Grade = Literal["agrees", "close", "differs"]

_PRINTED = re.compile(r"(\d+(?:\.\d+)?)(?: ± (\d*\.\d+))?")
_TERM = re.compile(r"(\d*)((?:[a-z]²?)+)")


@dataclass(frozen=True)
class PrintedNumber:
    """A number as printed.

    Attributes:
        text: as printed.
        value: of the text.
        half: half a unit of the last printed digit.
        std: standard deviation printed with it; None without one.
    """

    text: str
    value: float
    half: float
    std: float | None = None

    @classmethod
    def of(cls, text: str) -> PrintedNumber:
        """Read a number with its digits, and a standard deviation after " ± ".

        Raises:
            ValueError: the text is not a plain decimal number.
        """
        match = _PRINTED.fullmatch(text)
        if match is None:
            raise ValueError(f"{text!r} is not a decimal number as printed, e.g. '34.06' or '81.07 ± 0.02'")
        digits = len(match[1].partition(".")[2])
        return cls(text, float(match[1]), 0.5 * 10.0**-digits, float(match[2]) if match[2] else None)

    def grade(self, value: float, tolerance: float) -> Grade:
        """Compare a value with the printed one.

        Args:
            value: in the same unit.
            tolerance: relative.

        Returns:
            ``agrees``: the value would be printed the same. ``close``: it is within the tolerance of such a value. Else
            ``differs``.
        """
        # A number on the boundary, 0.125 for 0.12 and 0.13, agrees with both, whatever its binary rounding.
        distance = abs(value - self.value) - 1e-9 * max(1.0, self.value)
        if distance <= self.half:
            return "agrees"
        return "close" if distance <= self.half + tolerance * self.value else "differs"

    def like(self, value: float) -> str:
        """Format a value with one digit more than is printed, so that the rounding is visible."""
        digits = len(self.text.partition(" ")[0].partition(".")[2])
        return f"{value:,.{digits + 1}f}" if digits else f"{value:,.0f}"


def evaluate(formula: str, values: Mapping[str, int]) -> int:
    """Evaluate a sum of products of letters such as ``2nr + mr`` or ``m² + n²``.

    Args:
        formula: as printed.
        values: letter → value.

    Raises:
        ValueError: another formula, or a letter without a value.
    """
    total = 0
    for term in formula.split("+"):
        match = _TERM.fullmatch(term.strip())
        if match is None:
            raise ValueError(f"{formula!r} is not a sum of products such as 2nr + mr")
        product = int(match[1] or 1)
        for letter, square in re.findall(r"([a-z])(²?)", match[2]):
            if letter not in values:
                raise ValueError(f"{formula!r} needs a value for {letter}")
            product *= values[letter] ** (2 if square else 1)
        total += product
    return total


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


class PaperSource(_Part):
    """The publication that contains the table."""

    paper: str
    arxiv: str
    table: str


class Accounting(_Part):
    """What a figure of memory counts."""

    counts: list[Literal["weights", "state", "low_rank_state"]] = ["weights", "state"]
    """The parts that the figure contains; low_rank_state: only that of matrices with a rule of their own, and of the
    factors of an adapter."""
    bytes_per_number: int = Field(default=2, ge=1)
    """Of every weight, and of every state number unless the next key says otherwise."""
    bytes_per_state_number: int | None = Field(default=None, ge=1)


class Quantity(Accounting):
    """The quantity that a cell states; the keys of `Accounting` are for memory."""

    kind: Literal["perplexity", "memory", "state_numbers", "metric", "hours"]
    """perplexity: on the validation split, measured only; memory: counted; state_numbers: of one matrix, counted;
    metric: of the last evaluation of a task, measured only; hours: of the whole run, measured only."""
    unit: str = ""
    """memory: a key of `BYTES`; metric: %; else any word."""
    tolerance: float = Field(default=0.0, ge=0)
    """Relative, on top of the rounding of the printed digits: what still counts as close."""

    @model_validator(mode="after")
    def _unit_is_one(self) -> Quantity:
        if self.kind == "memory" and self.unit not in BYTES:
            raise ValueError(f"unit {self.unit or 'nothing'!r} is not a unit of memory: {', '.join(BYTES)}")
        if self.kind == "metric" and self.unit != "%":
            raise ValueError(f"unit {self.unit or 'nothing'!r} is not the unit of a metric: %")
        return self

    def in_unit(self, size: float) -> float:
        """Convert bytes to the unit of memory."""
        return size / BYTES[self.unit]


class PaperColumn(_Part):
    """A model or a setting."""

    words: list[str] = []
    inputs: list[str] = []
    """As those of the table, for this column."""
    values: dict[str, int] = {}
    """Numbers that words of rows ($rank) and formulas refer to."""
    parameter: str | None = None
    """state_numbers: the name of the matrix."""
    metric: str | None = None
    """metric: a name of `harness.tasks.metrics.METRICS`."""
    examples: int | None = Field(default=None, ge=1)
    """metric: evaluated ones; a run with another number of them fills no cell."""

    @model_validator(mode="after")
    def _metric_is_known(self) -> PaperColumn:
        if self.metric is not None and self.metric not in METRICS:
            raise ValueError(f"metric {self.metric} is not one of {', '.join(METRICS)}")
        return self


class KnownDifference(_Part):
    """A disagreement with a known reason; it applies only to the prediction stated here."""

    column: str
    quantity: str
    predicted: str
    reason: str


class PaperRow(_Part):
    """A method of the paper."""

    words: list[str] = []
    absent: str | None = None
    """Why optbench neither runs nor plans it; excludes words."""
    published: dict[str, dict[str, str]] = {}
    """Column → quantity → as printed."""
    formula: str | None = None
    """state_numbers: as printed, in m, n, r; evaluated with each column's values."""
    unstated: list[str] = []
    """Keys that the paper does not state: a run may have any value."""
    accounting: dict[str, Accounting] = {}
    """Quantity of memory → what the figures of this row count, where that differs from the other rows."""
    known: list[KnownDifference] = []
    note: str | None = None


class PaperTable(_Part):
    """One table of a paper."""

    title: str
    source: PaperSource
    provenance: dict[str, Literal["read", "derived", "recalled", "unstated"]]
    """Part of the file → read in the source, derived from it, recalled, or not stated there."""
    words: list[str] = []
    """Overrides of every run of the table: the protocol."""
    inputs: list[str] = []
    """Further overrides of the printed commands: a model and data that the user has. A run may have others there, but
    a model needs weights."""
    unstated: list[str] = []
    """As in rows, for all of them."""
    quantities: dict[str, Quantity]
    columns: dict[str, PaperColumn]
    rows: dict[str, PaperRow]
    notes: list[str] = []

    @model_validator(mode="after")
    def _names_agree(self) -> PaperTable:
        for name, row in self.rows.items():
            if bool(row.words) == bool(row.absent):
                raise ValueError(f"row {name} needs words, or absent with the reason, and not both")
            if bool(row.published) == bool(row.formula):
                raise ValueError(f"row {name} needs published, or formula, and not both")
            places = [(c, q, text) for c, inside in row.published.items() for q, text in inside.items()]
            places += [(known.column, known.quantity, known.predicted) for known in row.known]
            for column, quantity, text in places:
                if column not in self.columns or quantity not in self.quantities:
                    raise ValueError(
                        f"row {name} has {column}, {quantity}, which is not a column and quantity"
                    )
                PrintedNumber.of(text)
                if self.quantities[quantity].kind == "metric" and self.columns[column].metric is None:
                    raise ValueError(f"column {column} needs the name of its metric")
            if stray := [q for q in row.accounting if q not in self.quantities]:
                raise ValueError(f"row {name} has accounting of {stray[0]}, which is not a quantity")
            if row.formula:
                self._check_formula(name, row.formula)
        return self

    def _check_formula(self, name: str, formula: str) -> None:
        if [quantity.kind for quantity in self.quantities.values()] != ["state_numbers"]:
            raise ValueError(f"row {name} has a formula, which needs one quantity of kind state_numbers")
        for column in self.columns.values():
            evaluate(formula, column.values)

    def published(self, row: str, column: str) -> dict[str, PrintedNumber]:
        """Return quantity → number that the table prints in this row and column."""
        formula = self.rows[row].formula
        if formula is not None:
            (quantity,) = self.quantities
            return {quantity: PrintedNumber.of(str(evaluate(formula, self.columns[column].values)))}
        texts = self.rows[row].published.get(column, {})
        return {quantity: PrintedNumber.of(text) for quantity, text in texts.items()}

    def accounting(self, row: str, quantity: str) -> Accounting:
        """Return what a figure of memory of this row counts."""
        return self.rows[row].accounting.get(quantity, self.quantities[quantity])

    def inputs_of(self, column: str) -> list[str]:
        """Return the overrides of the printed commands of a column that stand for what the user has."""
        return [*self.inputs, *self.columns[column].inputs]

    def any_value(self, row: str) -> list[str]:
        """Return the keys that the paper does not state for this row."""
        return [*self.unstated, *self.rows[row].unstated]

    def run_words(self, row: str, column: str) -> list[str]:
        """Return the overrides of the run that would fill the cell; none for a method that optbench does not have.

        Raises:
            ValueError: an override refers to a value that the column lacks.
        """
        overrides = self.rows[row].words
        if not overrides:
            return []
        values = self.columns[column].values
        try:
            own = [Template(word).substitute(values) for word in overrides]
        except KeyError as error:
            raise ValueError(f"column {column} has no value {error.args[0]}") from None
        return [*self.words, *self.columns[column].words, *own]


def names() -> list[str]:
    """Return the names of all tables, including the user's own."""
    return sources.options(GROUP)


def path_of(name: str) -> Path:
    """Return the file of a table.

    Raises:
        InputError: no such table.
    """
    path = sources.find(GROUP, name)
    if path is None:
        guess = closest(name, names()) or next(iter(names()), "")
        raise InputError("paper", name, "is not a table", allowed=names(), fix=f"optbench paper {guess}")
    return path


def load(name: str) -> PaperTable:
    """Read and check a table.

    Raises:
        InputError: no such table; a file that is not YAML or has a wrong key or value.
    """
    path = path_of(name)
    content = yaml_files.read(GROUP, path)
    try:
        return PaperTable.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "table"
        raise InputError(
            place, "in " + str(path), f"is wrong ({first['msg']})", fix=f"correct {path}"
        ) from None
