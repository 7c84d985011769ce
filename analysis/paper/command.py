"""`optbench paper TABLE`: a published table next to the predicted and the measured values."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from analysis.paper import tables
from analysis.text_tables import TextTable, print_table
from harness import command_line
from harness.commands import COMMANDS
from harness.console import for_tables
from harness.errors import InputError, closest
from harness.files import atomic
from harness.output import json_document
from harness.visible import visible

AGREES, DISAGREES = 0, 1
KEYS = ("runs",)


@dataclass(frozen=True)
class PaperRequest:
    """A call of `optbench paper`.

    Attributes:
        table: name of a table; None: list all tables.
        runs: folder of finished runs; None: no run is looked at.
        out: folder for files; None: none are written.
        commands: the commands of the missing runs instead of the table.
        as_json: one JSON document.
    """

    table: str | None
    runs: Path | None = None
    out: Path | None = None
    commands: bool = False
    as_json: bool = False


def main(argv: Sequence[str]) -> int:
    """Fill a table, print it and write its files; without a table, list all tables.

    Returns:
        0: every value is within the table's tolerance. 1: a predicted or measured value is not, whether the reason
        is known or not. ``--list`` and ``--commands`` return 0.

    Raises:
        InputError: bad input, of the command line or in a table's file.
    """
    request = parse(argv)
    if request.table is None:
        _print_list(request.as_json)
        return AGREES
    if request.out is not None:
        atomic.check_folder("--out", request.out, fix="--out runs/paper")
    # These imports take a second, which an invalid argument does not need.
    from analysis.paper import outputs
    from analysis.paper.filling import fill

    filled = fill(request.table, request.runs)
    if request.out is not None:
        for path in outputs.write(filled, request.out):
            print(visible(path), file=sys.stderr)
    if request.commands:
        runs = [{"command": run, "cells": cells} for run, cells in filled.commands.items()]
        lines = outputs.command_lines(filled)
        print(json_document(table=filled.name, commands=runs) if request.as_json else "\n".join(lines))
        return AGREES
    if request.as_json:
        print(json_document(**outputs.document(filled)))
    else:
        outputs.show(filled, for_tables())
    return DISAGREES if filled.disagrees else AGREES


def _print_list(as_json: bool) -> None:
    loaded = {name: tables.load(name) for name in tables.names()}
    if as_json:
        rows = [
            {"name": name, "title": table.title, "source": table.source.model_dump()}
            for name, table in loaded.items()
        ]
        print(json_document(tables=rows))
        return
    rows = [
        [name, f"arXiv {table.source.arxiv}, Table {table.source.table}", table.title]
        for name, table in loaded.items()
    ]
    print_table(TextTable(["table", "source", "of"], rows), sys.stdout)
    print("optbench paper TABLE: published, predicted, measured")


def parse(argv: Sequence[str]) -> PaperRequest:
    """Parse the arguments of ``optbench paper``.

    Without ``runs=`` the runs are those in ``runs/TABLE``, if that folder exists.

    Raises:
        InputError: an unknown argument, option or table, a missing folder, or options that exclude each other.
    """
    arguments = command_line.parse("paper", argv)
    options, names = arguments.options, arguments.names
    values = dict(argument.split("=", 1) for argument in arguments.overrides)
    for key, value in values.items():
        if key not in KEYS:
            guess = closest(key, KEYS)
            raise InputError(key, value, "is for an unknown key", allowed=KEYS, fix=f"{guess or 'runs'}=DIR")
    if not names or options.list:
        _refuse_more(arguments)
        return PaperRequest(None, as_json=options.json)
    if len(names) > 1:
        usage = COMMANDS["paper"].usage
        fix = f"optbench paper {names[0]}"
        raise InputError("paper", " ".join(names), "is not one table", allowed=usage, fix=fix)
    (name,) = names
    tables.load(name)
    return PaperRequest(
        name,
        runs=_runs_folder(name, values.get("runs")),
        out=_out_folder(options.out),
        commands=options.commands,
        as_json=options.json,
    )


def _refuse_more(arguments: command_line.Arguments) -> None:
    """Refuse everything but ``--json`` next to the list of tables."""
    more = list(arguments.rest)
    if arguments.options.out is not None:
        more.append(f"--out {arguments.options.out}")
    if arguments.options.commands:
        more.append("--commands")
    if more:
        fix = f"optbench paper {(arguments.names or tables.names() or ['TABLE'])[0]}"
        raise InputError("paper", " ".join(more), "and the list of tables exclude each other", fix=fix)


def _runs_folder(name: str, value: str | None) -> Path | None:
    if value is None:
        # The printed commands put their runs there.
        default = Path("runs") / name
        return default if default.is_dir() else None
    folder = Path(value)
    if not value or not folder.is_dir():
        allowed = "a folder with run folders below it"
        raise InputError("runs", value or "nothing", "is not a folder", allowed=allowed)
    return folder


def _out_folder(value: str | None) -> Path | None:
    if value is not None and Path(value).exists() and not Path(value).is_dir():
        raise InputError("--out", value, "is a file", allowed="a folder")
    return None if value is None else Path(value)
