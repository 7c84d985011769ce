"""`optbench paper TABLE`: a published table beside what is predicted and what was measured."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from analysis.paper import arguments, tables
from harness.console import cell, for_tables
from harness.files import atomic
from harness.output import json_document
from harness.visible import visible

DONE, NO = 0, 1


def main(argv: Sequence[str]) -> int:
    """Fill a table, print it and write its files; without a table print the list of all.

    Returns:
        0 done · 1 a predicted or measured value is outside of the table's tolerance, whether the reason is known
        or not. ``--list`` and ``--commands`` judge nothing and return 0.

    Raises:
        InputError: bad input, of the command line or in a table's file.
    """
    asked = arguments.read(argv)
    console = for_tables()
    if asked.table is None:
        _list(asked.as_json, console)
        return DONE
    if asked.out is not None:
        atomic.check_folder("--out", asked.out, fix="--out runs/paper")
    # What is imported here takes a second: words are checked without it.
    from analysis.paper import outputs
    from analysis.paper.filling import fill

    filled = fill(asked.table, asked.runs)
    if asked.out is not None:
        for path in outputs.write(filled, asked.out):
            print(visible(path), file=sys.stderr)
    if asked.commands:
        runs = [{"command": run, "cells": cells} for run, cells in filled.commands.items()]
        lines = outputs.command_lines(filled)
        print(json_document(table=filled.name, commands=runs) if asked.as_json else "\n".join(lines))
        return DONE
    if asked.as_json:
        print(json_document(**outputs.document(filled)))
    else:
        outputs.show(filled, console)
    return NO if filled.disagrees else DONE


def _list(as_json: bool, console: Console) -> None:
    loaded = {name: tables.load(name) for name in tables.names()}
    if as_json:
        rows = [
            {"name": name, "title": table.title, "source": table.source.model_dump()}
            for name, table in loaded.items()
        ]
        print(json_document(tables=rows))
        return
    drawn = Table(box=None, pad_edge=False, header_style="bold")
    for head in ("table", "source", "of"):
        drawn.add_column(head)
    for name, table in loaded.items():
        source = f"arXiv {table.source.arxiv}, Table {table.source.table}"
        drawn.add_row(cell(name), cell(source), cell(table.title))
    console.print(drawn)
    console.print("optbench paper TABLE: published, predicted, measured")
