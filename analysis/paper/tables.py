"""The files of configs/paper: what a table prints, under which protocol, and from which source. Torch-free."""

from __future__ import annotations

from pathlib import Path
from string import Template
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from analysis.paper.numbers import Printed, evaluate
from harness.config import sources, yaml_files
from harness.errors import InputError, closest

GROUP = "paper"
BYTES = {"GiB": 2.0**30, "MiB": 2.0**20, "GB": 1e9, "MB": 1e6}
"""Unit of memory → bytes."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


class Source(_Part):
    """Where the table stands."""

    paper: str
    arxiv: str
    table: str


class Quantity(_Part):
    """What a cell states."""

    kind: Literal["perplexity", "memory", "state_numbers"]
    """perplexity: on the validation split, measured only; memory: counted; state_numbers: of one matrix, counted."""
    unit: str = ""
    """memory: a key of `BYTES`; else any word."""
    tolerance: float = Field(default=0.0, ge=0)
    """Relative, on top of the rounding of the printed digits: what still counts as close."""
    counts: list[Literal["weights", "state"]] = ["weights", "state"]
    """memory: what the figure is made of."""
    bytes_per_number: int = Field(default=2, ge=1)
    """memory: of every weight and state number."""

    @model_validator(mode="after")
    def _unit_is_one(self) -> Quantity:
        if self.kind == "memory" and self.unit not in BYTES:
            raise ValueError(f"unit {self.unit or 'nothing'!r} is none of memory: {', '.join(BYTES)}")
        return self

    def in_unit(self, size: float) -> float:
        """Bytes in the unit of memory."""
        return size / BYTES[self.unit]


class Column(_Part):
    """A model or setting."""

    words: list[str] = []
    values: dict[str, int] = {}
    """Numbers that words of rows ($rank) and formulas refer to."""
    parameter: str | None = None
    """state_numbers: the matrix that is looked at."""


class Known(_Part):
    """A disagreement that has a reason. It holds for the prediction named here and no other."""

    column: str
    quantity: str
    predicted: str
    reason: str


class Row(_Part):
    """A method."""

    words: list[str] = []
    absent: str | None = None
    """Why optbench neither runs nor plans it; excludes words."""
    published: dict[str, dict[str, str]] = {}
    """Column → quantity → as printed."""
    formula: str | None = None
    """state_numbers: as printed, in m, n, r; evaluated with each column's values."""
    unstated: list[str] = []
    """Keys that the paper leaves open: a run may have any value there."""
    known: list[Known] = []
    note: str | None = None


class PaperTable(_Part):
    """One table of a paper."""

    title: str
    source: Source
    provenance: dict[str, Literal["read", "derived", "recalled", "unstated"]]
    """What is in the file → read in the source, derived from what was read, recalled, or not stated there."""
    words: list[str] = []
    """Of every run of the table: the protocol."""
    quantities: dict[str, Quantity]
    columns: dict[str, Column]
    rows: dict[str, Row]
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
                    raise ValueError(f"row {name} has {column}, {quantity}, which is no column and quantity")
                Printed.of(text)
            if row.formula:
                self._check_formula(name, row.formula)
        return self

    def _check_formula(self, name: str, formula: str) -> None:
        if [quantity.kind for quantity in self.quantities.values()] != ["state_numbers"]:
            raise ValueError(f"row {name} has a formula, which needs one quantity of kind state_numbers")
        for column in self.columns.values():
            evaluate(formula, column.values)

    def published(self, row: str, column: str) -> dict[str, Printed]:
        """Quantity → what the table prints in this row and column."""
        formula = self.rows[row].formula
        if formula is not None:
            (quantity,) = self.quantities
            return {quantity: Printed.of(str(evaluate(formula, self.columns[column].values)))}
        texts = self.rows[row].published.get(column, {})
        return {quantity: Printed.of(text) for quantity, text in texts.items()}

    def run_words(self, row: str, column: str) -> list[str]:
        """Words of the run that would fill the cell; none for a method that optbench does not have.

        Raises:
            ValueError: a word refers to a value that the column lacks.
        """
        given = self.rows[row].words
        if not given:
            return []
        values = self.columns[column].values
        try:
            own = [Template(word).substitute(values) for word in given]
        except KeyError as error:
            raise ValueError(f"column {column} has no value {error.args[0]}") from None
        return [*self.words, *self.columns[column].words, *own]


def names() -> list[str]:
    """Names of all tables, the user's own among them."""
    return sources.options(GROUP)


def path_of(name: str) -> Path:
    """The file of a table.

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
