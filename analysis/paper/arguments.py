"""What `optbench paper` was told, checked word by word. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from analysis.paper import tables
from harness.config.errors import InputError, closest

FLAGS = ("--list", "--commands", "--out", "--json")
KEYS = ("runs",)
_USAGE = "TABLE [runs=DIR] [--commands] [--out DIR] [--json] | [--list] [--json]"


@dataclass(frozen=True)
class Request:
    """What was asked for.

    Attributes:
        table: name of a table; None: the list of all.
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
    """Read the words after ``optbench paper``.

    Without ``runs=`` the runs are those of the group that the printed commands put them in, ``runs/TABLE``, if
    there are any.

    Raises:
        InputError: an unknown word, flag or table, a folder that does not exist, or flags that exclude each other.
    """
    names: list[str] = []
    values: dict[str, str] = {}
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        key, equals, value = word.partition("=")
        if key == "--out":
            value = value if equals else (rest.pop(0) if rest else "")
            if not value or value.startswith("--"):
                raise InputError("--out", value or "nothing", "names no folder", fix="--out runs/paper")
            values[key] = value
        elif word in FLAGS:
            values[word] = ""
        elif word.startswith("-"):
            raise InputError("argument", word, "is not known", allowed=FLAGS)
        elif equals and key not in KEYS:
            guess = closest(key, KEYS)
            raise InputError(key, value, "is for an unknown key", allowed=KEYS, fix=f"{guess or 'runs'}=DIR")
        elif equals:
            values[key] = value
        else:
            names.append(word)
    if not names or "--list" in values:
        _refuse_more(names, values)
        return Request(None, as_json="--json" in values)
    if len(names) > 1:
        shown = " ".join(names)
        raise InputError("paper", shown, "is not one table", allowed=_USAGE, fix=f"optbench paper {names[0]}")
    (name,) = names
    tables.load(name)
    return Request(
        name,
        runs=_runs(name, values.get("runs")),
        out=_out(values.get("--out")),
        commands="--commands" in values,
        as_json="--json" in values,
    )


def _refuse_more(names: Sequence[str], values: dict[str, str]) -> None:
    more = [
        *names,
        *(f"{key}={v}" if v else key for key, v in values.items() if key not in ("--list", "--json")),
    ]
    if more:
        fix = f"optbench paper {(names or tables.names() or ['TABLE'])[0]}"
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
