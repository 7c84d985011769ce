"""Rows for tasks with examples: a row is a dictionary of named values, read from local files or a data set."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args

from harness.config.data_checks import check_splits
from harness.config.schema import DataConfig
from harness.data import hub, local_files, row_files
from harness.data.file_errors import Place
from harness.data.row_files import Wanted
from harness.data.sources import describe_files, layout_of
from harness.errors import InputError
from harness.files.cache import Fingerprints

Value = str | int | float | bool | None
Row = dict[str, Value]
Split = Literal["train", "validation"]


class Rows(Iterator[Row]):
    """The rows of a split, in the order of the source.

    Attributes:
        read: rows so far; the last one has the number ``read - 1``. Blank lines of a file are not rows.
        place: where the last row is, as in "train.tsv, line 5", for messages.
        classes: column of a data set → its classes in the order of the data set, once a row was read.
    """

    def __init__(self, config: DataConfig, split: Split, wanted: Wanted | None) -> None:
        self._wanted = wanted
        self.read, self.place = 0, ""
        self.classes: dict[str, list[str]] = {}
        self._rows = (
            self._of_set(config, split) if config.source == "datasets" else self._of_files(config, split)
        )

    def __next__(self) -> Row:
        row = next(self._rows)
        self.read += 1
        for name, value in row.items():
            if value is not None and not isinstance(value, str | int | float):
                key = (self._wanted or {}).get(name, "data.source")
                kind = type(value).__name__
                raise InputError(key, name, f"holds {kind}, not text or a number, in {self.place}")
            if isinstance(value, str) and not value.isascii():
                # JSON can spell lone surrogates, which UTF-8 cannot: they become question marks, as in a corpus.
                row[name] = value.encode("utf-8", errors="replace").decode("utf-8")
        return row

    def _of_files(self, config: DataConfig, split: Split) -> Iterator[dict[str, Any]]:
        key, patterns = _files(config, split)
        layout = layout_of(config)
        for path in local_files.find(patterns, config.source, key):
            place = Place(path, key)
            for row in row_files.rows(place, layout, self._wanted):
                self.place = str(place)
                yield row

    def _of_set(self, config: DataConfig, split: Split) -> Iterator[dict[str, Any]]:
        name = _split_name(config, split)
        for number, row in enumerate(hub.rows(config, name, self._wanted, self.classes), 1):
            self.place = f"{config.dataset}, split {name}, row {number}"
            yield row


def read_rows(config: DataConfig, split: Split, wanted: Wanted | None = None) -> Rows:
    """Start to read the rows of a split.

    Values of csv and tsv are text; those of the other sources keep their type. A value that is missing (null, or a
    key that other rows have) is None; an empty field of csv and tsv is an empty text.

    Args:
        split: train: ``data.files`` or ``data.split``; validation: ``data.validation_files`` or
            ``data.validation_split``.
        wanted: column → configuration key that names it, for messages; None: all columns.

    Returns:
        The rows, each with the wanted columns. Reading raises InputError, with file and row, for damage, a row that
        does not fit the others, a column that no row has, or a value that is a list or an object.

    Raises:
        InputError: a source without columns; a split that is not configured.
    """
    check_splits(config)
    return Rows(config, split, wanted)


def describe_rows(config: DataConfig, fingerprints: Fingerprints) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return (identity, facts) of the rows of both splits, as `harness.data.sources.TextSource` has them.

    Raises:
        InputError: as `read_rows`, or files that are missing.
    """
    check_splits(config)
    if config.source == "datasets":
        identity, facts = hub.describe_contents(config, fingerprints)
        splits = {split: _split_name(config, split) for split in get_args(Split)}
        return identity | splits, facts | splits
    identity: dict[str, Any] = {}
    facts: dict[str, Any] = {"name": config.name}
    training: set[Path] = set()
    for split in get_args(Split):
        key, patterns = _files(config, split)
        found = local_files.find(patterns, config.source, key)
        if shared := next((file for file in found if file.resolve() in training), None):
            raise InputError(
                key, shared, "is one of data.files, too", allowed="files that are not trained on"
            )
        training = {file.resolve() for file in found}
        identity[split], facts[split] = describe_files(found, layout_of(config), fingerprints, key)
    return identity, facts


def _files(config: DataConfig, split: Split) -> tuple[str, list[str]]:
    if split == "train":
        return "data.files", config.files
    return "data.validation_files", config.validation_files


def _split_name(config: DataConfig, split: Split) -> str:
    return config.split if split == "train" else config.validation_split or ""
