"""The arguments of `optbench paper`, checked. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from analysis.paper import tables
from harness import command_line
from harness.commands import COMMANDS
from harness.errors import InputError, closest

KEYS = ("runs",)


@dataclass(frozen=True)
class Request:
    """One `optbench paper`.

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


def read(argv: Sequence[str]) -> Request:
    """Parse the arguments of ``optbench paper``.

    Without ``runs=`` the runs are those of the group that the printed commands put them in, ``runs/TABLE``, if
    there are any.

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
        return Request(None, as_json=options.json)
    if len(names) > 1:
        usage = COMMANDS["paper"].usage
        fix = f"optbench paper {names[0]}"
        raise InputError("paper", " ".join(names), "is not one table", allowed=usage, fix=fix)
    (name,) = names
    tables.load(name)
    return Request(
        name,
        runs=_runs(name, values.get("runs")),
        out=_out(options.out),
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


def _runs(name: str, given: str | None) -> Path | None:
    if given is None:
        usual = Path("runs") / name
        return usual if usual.is_dir() else None
    folder = Path(given)
    if not given or not folder.is_dir():
        raise InputError(
            "runs", given or "nothing", "is not a folder", allowed="a folder with run folders below it"
        )
    return folder


def _out(given: str | None) -> Path | None:
    if given is not None and Path(given).exists() and not Path(given).is_dir():
        raise InputError("--out", given, "is a file", allowed="a folder")
    return None if given is None else Path(given)
