"""Tables in an experiment: values that depend on the value of another key.

    by:
      data.name:
        rte: {optimizer: {lr: 1.0e-5}}
        cola: {optimizer: {lr: 3.0e-5}, batch_size: 32}
        else: {}

One file then holds a protocol whose settings differ by task, as published tables of hyper-parameters do:
``experiment=NAME data.name=cola`` takes the second row. A file that builds on another one adds to its rows, and a row
of null takes a row of that file away.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from harness.errors import InputError

KEY = "by"
OTHERWISE = "else"
"""Row for every value without a row of its own; without it, such a value is an error."""
_DEEPEST = 4


def merge_rows(values: dict[str, Any], explicit: Mapping[str, Any], path: Path | None) -> None:
    """Merge into ``values`` the rows that apply, and remove the tables.

    A row may hold a table, which is read after the row is merged: its key may be one that the row sets.

    Args:
        values: nested, as the group files give them; changed in place.
        explicit: dotted key → value of the command line and the user's file, which decide before ``values`` do.
        path: of the experiment, for errors.

    Raises:
        InputError: a table is not one, or a key has a value without a row.
    """
    for _ in range(_DEEPEST):
        tables = values.pop(KEY, None)
        if tables is None:
            return
        if not isinstance(tables, dict):
            raise _not_tables(tables, path)
        for key, rows in tables.items():
            _merge(values, _row(str(key), rows, values, explicit, path))
    if KEY in values:
        raise _not_tables(values[KEY], path)


def _row(
    key: str, rows: Any, values: Mapping[str, Any], explicit: Mapping[str, Any], path: Path | None
) -> dict[str, Any]:
    if (
        not isinstance(rows, dict)
        or not rows
        or not all(isinstance(row, dict | None) for row in rows.values())
    ):
        raise _not_tables(rows, path)
    by_text = {str(name): row for name, row in rows.items() if row is not None}
    value = explicit[key] if key in explicit else _find(values, key)
    row = by_text.get(str(value), by_text.get(OTHERWISE))
    if row is None:
        known = [name for name in by_text if name != OTHERWISE]
        shown = "null" if value is None else value
        fix = f"{key}={known[0]}" if known else f"add a row to {path}"
        raise InputError(key, shown, f"has no row in {path}", allowed=known, fix=fix)
    return row


def _find(values: Mapping[str, Any], key: str) -> Any:
    place: Any = values
    for name in key.split("."):
        place = place.get(name) if isinstance(place, dict) else None
    return place


def _merge(values: dict[str, Any], row: Mapping[str, Any]) -> None:
    for name, value in row.items():
        inside = values.get(name)
        if isinstance(value, dict) and isinstance(inside, dict):
            _merge(inside, value)
        else:
            values[name] = value


def _not_tables(found: Any, path: Path | None) -> InputError:
    allowed = "key: {value: {keys that it sets}}, four deep at most"
    return InputError(
        KEY, found, f"in {path} is not a table of values", allowed=allowed, fix=f"correct {path}"
    )
