"""`optbench paper TABLE`: a published table next to predicted and measured values; or SUMO's lemmas and figures."""

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
THEORY = "sumo_theory"
"""Name that takes the place of a table: SUMO's lemmas and figures."""
THEORY_TITLE = "lemmas 3.1 and 3.2, figures 1 and 2: simulated, and on moments of real runs"


def names() -> list[str]:
    """Return what the command takes: the tables, and SUMO's theory."""
    return [*tables.names(), THEORY]


@dataclass(frozen=True)
class PaperRequest:
    """A call of `optbench paper`.

    Attributes:
        table: name of a table; None: list all tables.
        runs: folders of finished runs, of which a table takes at most one; empty: no run is looked at.
        out: folder for files; None: none are written.
        commands: the commands of the missing runs instead of the table.
        as_json: one JSON document.
    """

    table: str | None
    runs: tuple[Path, ...] = ()
    out: Path | None = None
    commands: bool = False
    as_json: bool = False


def main(argv: Sequence[str]) -> int:
    """Fill a table, print it and write its files; without a table, list all tables.

    Returns:
        0: every value is within the table's tolerance, and every check of the theory's page passed. 1: a predicted or
        measured value is not, whether the reason is known or not. ``--list`` and ``--commands`` return 0.

    Raises:
        InputError: bad input, of the command line or in a table's file.
    """
    request = parse(argv)
    if request.table is None:
        _print_list(request.as_json)
        return AGREES
    if request.out is not None:
        atomic.check_folder("--out", request.out, fix="--out runs/paper")
    if request.table == THEORY:
        return _show_theory(request)
    # These imports take a second, which an invalid argument does not need.
    from analysis.paper import outputs
    from analysis.paper.filling import fill

    filled = fill(request.table, request.runs[0] if request.runs else None)
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


def _show_theory(request: PaperRequest) -> int:
    """Compute SUMO's lemmas and figures, print them and write their files."""
    from analysis.paper.theory import findings, report

    if request.commands:
        commands = [{"command": command, "cells": ["Figures 1 and 2"]} for command in findings.COMMANDS]
        lines = "\n".join(findings.COMMANDS)
        print(json_document(table=THEORY, commands=commands) if request.as_json else lines)
        return AGREES
    theory = findings.compute(request.runs)
    if request.out is not None:
        for path in report.write(theory, request.out):
            print(visible(path), file=sys.stderr)
    if request.as_json:
        print(json_document(**report.document(theory)))
    else:
        report.show(theory, sys.stdout)
    return AGREES if theory.passed else DISAGREES


def _print_list(as_json: bool) -> None:
    loaded = {name: tables.load(name) for name in tables.names()}
    if as_json:
        rows = [
            {"name": name, "title": table.title, "source": table.source.model_dump()}
            for name, table in loaded.items()
        ]
        theory = {"name": THEORY, "title": THEORY_TITLE}
        print(json_document(tables=rows, analyses=[theory]))
        return
    rows = [
        [name, f"arXiv {table.source.arxiv}, Table {table.source.table}", table.title]
        for name, table in loaded.items()
    ]
    rows.append([THEORY, "arXiv 2505.24749", THEORY_TITLE])
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
    values = [argument.split("=", 1) for argument in arguments.overrides]
    for key, value in values:
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
    if name != THEORY:
        if closest(name, known := [*tables.names(), THEORY]) == THEORY:
            raise InputError("paper", name, "is not a table", allowed=known, fix=f"optbench paper {THEORY}")
        tables.load(name)
        if len(values) > 1:
            fix = f"runs={values[0][1]}"
            raise InputError("runs", " ".join(v for _, v in values), "is more than one folder", fix=fix)
    return PaperRequest(
        name,
        runs=_runs_folders(name, [value for _, value in values]),
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


def _runs_folders(name: str, values: Sequence[str]) -> tuple[Path, ...]:
    if not values:
        # The printed commands put their runs there.
        default = Path("runs") / name
        return (default,) if default.is_dir() else ()
    for value in values:
        if not value or not Path(value).is_dir():
            allowed = "a folder with run folders below it"
            raise InputError("runs", value or "nothing", "is not a folder", allowed=allowed)
    return tuple(Path(value) for value in values)


def _out_folder(value: str | None) -> Path | None:
    if value is not None and Path(value).exists() and not Path(value).is_dir():
        raise InputError("--out", value, "is a file", allowed="a folder")
    return None if value is None else Path(value)
