"""Tables of text: printed to a terminal, written as Markdown, or shown on a page."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TextIO

from rich.table import Table as RichTable

from harness.console import cell, for_tables
from harness.visible import markdown_row


@dataclass(frozen=True)
class TextTable:
    """A table whose cells are text, with one head per column."""

    heads: list[str]
    rows: list[list[str]]
    title: str = ""
    caption: str = ""

    def transposed(self) -> TextTable:
        """Return the table with a column per row: the way to show few things with many figures."""
        turned = [list(column) for column in zip(self.heads, *self.rows)]
        return TextTable(turned[0], turned[1:], self.title, self.caption)


def print_table(table: TextTable, stream: TextIO) -> None:
    """Print a table to a terminal or a file."""
    drawn = RichTable(header_style="bold", pad_edge=False, box=None)
    for head in table.heads:
        drawn.add_column(cell(head), overflow="fold")
    for row in table.rows:
        drawn.add_row(*map(cell, row))
    for_tables(stream).print(drawn)


def markdown_lines(
    heads: Iterable[str], rows: Iterable[Iterable[str]], numeric: Sequence[bool] | None = None
) -> list[str]:
    """Return the lines of a GitHub-flavoured Markdown table.

    Args:
        heads: one per column.
        rows: cells of each row.
        numeric: per column, align right (True) or left (False); None: no alignment.
    """
    heads = list(heads)
    rule = ["---"] * len(heads) if numeric is None else ["---:" if right else ":---" for right in numeric]
    return [markdown_row(heads), markdown_row(rule), *map(markdown_row, rows)]
