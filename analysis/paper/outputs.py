"""Write a filled table to the terminal, as JSON, and as files."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from analysis.formatting import to_jsonable
from analysis.paper.cells import STATUSES, FilledTable, PaperCell
from analysis.text_tables import markdown_lines
from harness import visible
from harness.files import atomic
from harness.output import json_document
from harness.visible import csv_cell

HEADS = ("row", "column", "published", "predicted", "measured", "unit", "status")
NUMERIC = ("published", "predicted", "measured")
_STYLES = {"differs": "red", "differs_known": "yellow", "not_run": "dim", "not_predictable": "dim"}


def document(filled: FilledTable) -> dict[str, Any]:
    """Return ``{"table", "cells": […], …}`` of ``--json``; missing numbers are null."""
    table = filled.table
    return to_jsonable(
        {
            "table": filled.name,
            "title": table.title,
            "source": table.source.model_dump(),
            "provenance": table.provenance,
            "cells": [_cell(cell) for cell in filled.cells],
            "counts": filled.counts,
            "disagrees": filled.disagrees,
            "statuses": STATUSES,
            "runs": None if filled.runs is None else filled.runs.as_posix(),
            "remarks": filled.remarks,
            "notes": filled.notes,
        }
    )


def show(filled: FilledTable, console: Console) -> None:
    """Print the table, the reasons below it, and the number of missing runs."""
    console.print(_title(filled), style="bold", markup=False, soft_wrap=True)
    drawn = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for head in HEADS:
        drawn.add_column(head, justify="right" if head in NUMERIC else "left")
    for cell, texts in zip(filled.cells, _rows(filled), strict=True):
        drawn.add_row(*(Text(visible.visible(text)) for text in texts), style=_STYLES.get(cell.status))
    console.print(drawn)
    for line in (*_remarks(filled), sentence(filled)):
        console.print(line, markup=False, soft_wrap=True)
    if filled.commands:
        runs = f"{len(filled.commands)} runs" if len(filled.commands) > 1 else "one run"
        hint = f"{runs} would fill more: optbench paper {filled.name} --commands"
        console.print(hint, markup=False, soft_wrap=True)


def sentence(filled: FilledTable) -> str:
    """Return the number of cells by status, and the folder that was searched."""
    counts = ", ".join(f"{count} {status}" for status, count in filled.counts.items())
    where = f"runs below {filled.runs}" if filled.runs else "no runs (runs=DIR)"
    return f"{len(filled.cells)} cells: {counts}. Searched {where}."


def command_lines(filled: FilledTable) -> list[str]:
    """Return a shell script with the commands of the missing runs, each below a comment that names its cells."""
    return [line for run, cells in filled.commands.items() for line in (f"# {'; '.join(cells)}", run)]


def write(filled: FilledTable, folder: Path) -> list[Path]:
    """Write NAME.json, NAME.md and NAME.csv atomically, and return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = {
        "json": json_document(**document(filled)) + "\n",
        "md": _markdown(filled),
        "csv": _csv(filled),
    }
    paths = [folder / f"{filled.name}.{ending}" for ending in texts]
    for path, text in zip(paths, texts.values(), strict=True):
        atomic.write_text(path, text)
    return paths


def _cell(cell: PaperCell) -> dict[str, Any]:
    return {
        "row": cell.row,
        "column": cell.column,
        "published": cell.published.value,
        "predicted": cell.predicted,
        "measured": cell.measured,
        "status": cell.status,
        "unit": cell.quantity.unit,
        "printed": cell.published.text,
        "published_std": cell.published.std,
        "measured_std": cell.measured_std,
        "kind": cell.quantity.kind,
        "tolerance": cell.quantity.tolerance,
        "reason": cell.reason,
        "command": cell.command,
        "runs": cell.runs,
    }


def _title(filled: FilledTable) -> str:
    source = filled.table.source
    return f"{source.paper}, arXiv {source.arxiv}, Table {source.table}: {filled.table.title}"


def _rows(filled: FilledTable) -> list[list[str]]:
    rows = []
    for cell in filled.cells:
        own = ["–" if v is None else cell.published.like(v) for v in (cell.predicted, cell.measured)]
        rows.append([cell.row, cell.column, cell.published.text, *own, cell.quantity.unit, cell.status])
    return rows


def _remarks(filled: FilledTable) -> list[str]:
    """Return the reasons with their cells, then the runs that were not used, then the notes of the file."""
    places: dict[str, list[str]] = {}
    for cell in filled.cells:
        if cell.reason:
            places.setdefault(cell.reason, []).append(f"{cell.row}, {cell.column}")
    reasons = [f"{_places(cells)}: {reason}" for reason, cells in places.items()]
    return [*reasons, *filled.remarks, *(f"note: {note}" for note in filled.notes)]


def _places(cells: Sequence[str]) -> str:
    return "; ".join(cells) if len(cells) <= 3 else f"{cells[0]} and {len(cells) - 1} more"


def _markdown(filled: FilledTable) -> str:
    table = markdown_lines(HEADS, _rows(filled), [head in NUMERIC for head in HEADS])
    below = [f"- {visible.markdown(remark)}" for remark in _remarks(filled)]
    return "\n".join(
        [f"# {visible.markdown(_title(filled))}", "", *table, "", *below, "", sentence(filled), ""]
    )


def _csv(filled: FilledTable) -> str:
    buffer = io.StringIO()
    rows = [{**entry, "runs": " ".join(entry["runs"])} for entry in map(_cell, filled.cells)]
    writer = csv.DictWriter(buffer, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow(
            {key: csv_cell(value) if isinstance(value, str) else value for key, value in row.items()}
        )
    return buffer.getvalue()
