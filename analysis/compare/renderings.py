"""The comparison table on a terminal, as Markdown and as CSV; report.html.j2 writes it as HTML."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable
from typing import TextIO

from rich.console import Console
from rich.table import Table as RichTable

from analysis.compare.tables import COLUMNS, Column, Row, Table
from analysis.report.details import Grid
from harness import visible
from harness.console import cell, for_tables
from harness.visible import markdown_row

WHOLE, WITH_OUTCOME = 205, 100
"""Terminal widths from which the table stands in one piece, and failures in a column of their own."""


def print_table(table: Table, console: Console) -> None:
    """Print to a terminal: in one piece where it fits, else results, failures in words, and costs below."""
    if console.width >= WHOLE:
        console.print(_rich(table, table.columns, table.rows, table.title))
    else:
        spelled = console.width < WITH_OUTCOME
        kept = [row for row in table.rows if not row.failed]
        result = [c for c in table.columns if c.block != "cost" and not (spelled and c.key == "outcome")]
        console.print(_rich(table, result, kept if spelled else table.rows, table.title))
        for row in table.rows if spelled else ():
            if row.failed:
                console.print(cell(f"{row.cells['optimizer'].text}: {row.cells['outcome'].text}", "red"))
        console.print()
        console.print(_rich(table, [c for c in table.columns if c.block != "result"], kept, None))
    for note in table.notes:
        console.print(cell(note, "dim"))


def _rich(table: Table, columns: list[Column], rows: list[Row], title: str | None) -> RichTable:
    heading = cell(title) if title else None
    drawn = RichTable(title=heading, title_justify="left", header_style="bold", pad_edge=False, box=None)
    narrow = [c for c in columns if c.key not in ("lr_source", "lr_standing")]
    for column in narrow:
        head = f"{column.label}\n{column.unit}" if column.unit else column.label
        justify = "right" if column.numeric else "left"
        drawn.add_column(head, justify=justify, no_wrap=column.numeric, overflow="fold")
    for row in rows:
        drawn.add_row(*(cell(row.cells[c.key].text) for c in narrow), style="red" if row.failed else None)
    return drawn


def print_grid(table: Grid, stream: TextIO) -> None:
    """Print a table of words to a terminal or a file."""
    head, rows = table
    drawn = RichTable(header_style="bold", pad_edge=False, box=None)
    for column in head:
        drawn.add_column(cell(column), overflow="fold")
    for row in rows:
        drawn.add_row(*map(cell, row))
    for_tables(stream).print(drawn)


def markdown(tables: Iterable[tuple[Table, str]]) -> str:
    """GitHub-flavoured Markdown of tables with the verdict above each."""
    parts = []
    for table, verdict in tables:
        head = [f"{c.label} ({c.unit})" if c.unit else c.label for c in table.columns]
        lines = [f"## {visible.markdown(table.title)}", "", visible.markdown(verdict), "", markdown_row(head)]
        lines.append(markdown_row("---:" if c.numeric else ":---" for c in table.columns))
        lines += [markdown_row(row.cells[c.key].text for c in table.columns) for row in table.rows]
        lines += ["", *(f"- {visible.markdown(note)}" for note in table.notes)]
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def to_csv(tables: Iterable[Table]) -> str:
    """One header and all rows, the set's title in the first column; numbers in full precision, blanks where
    missing.
    """
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["set", *(f"{c.key} [{c.unit}]" if c.unit else c.key for c in COLUMNS)])
    for table in tables:
        for row in table.rows:
            writer.writerow(
                [visible.csv_cell(table.title), *(_plain(row.cells[c.key].value) for c in table.columns)]
            )
    return out.getvalue()


def _plain(value: float | str) -> str:
    if isinstance(value, str):
        return visible.csv_cell(value)
    return "" if math.isnan(value) else repr(float(value)).removesuffix(".0")
