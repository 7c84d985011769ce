"""The runs of an array job: a file with one run per row, whose numbers never change.

    python -m harness.jobs.grid FILE ROW     # folder and words of a row, each ended by a NUL byte

Torch-free.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from pydantic import TypeAdapter

from harness.config.errors import InputError
from harness.files import atomic, bounded
from harness.files.bounded import MIB, JsonDecoder, UnreadableFile
from harness.jobs.folder import folder_of

FILE = "grid.jsonl"
_LIMIT = 64 * MIB


@dataclass(frozen=True)
class Row:
    """One run.

    Attributes:
        words: of the run, without world_size.
        row: its number in the array.
        name: of the run, once in the grid; "" in a grid made by hand, as are the next two.
        folder: of the run.
        identity: of the run (`harness.config.identity`).
    """

    words: tuple[str, ...]
    row: int
    name: str = ""
    folder: str = ""
    identity: str = ""


_ROW, _DECODER = TypeAdapter(Row), JsonDecoder()


def read(path: Path) -> list[Row]:
    """The rows of a grid; none if there is no file.

    Raises:
        InputError: the file is damaged.
    """
    try:
        text = bounded.read_text(path, _LIMIT, [])
    except FileNotFoundError:
        return []
    except UnreadableFile as error:
        raise InputError(str(path), "the grid", f"can't be read: {error}", fix=f"remove {path}") from None
    rows: list[Row] = []
    for number, line in enumerate(text.rstrip("\n").split("\n") if text else ()):
        try:
            rows.append(_ROW.validate_python({"row": number, **_DECODER.decode(line)}))
        except (ValueError, TypeError):
            raise InputError(
                str(path), f"line {number + 1}", "is no row of a grid", fix=f"remove {path}"
            ) from None
        if rows[-1].row != number:
            raise InputError(
                str(path), f"line {number + 1}", f"says it is row {rows[-1].row}", fix=f"remove {path}"
            )
    return rows


def merged(old: Sequence[Row], new: Sequence[Row], busy: Sequence[int]) -> list[Row]:
    """The rows of an earlier grid, as far as they are told anew with their new words, and behind them those that it had
    not. Numbers stay what they are.

    Args:
        old: rows of the file.
        new: rows that are wanted now; their numbers do not matter.
        busy: numbers of rows that wait or run: their words must stay.

    Raises:
        InputError: a busy row is told otherwise.
    """
    rows = list(old)
    places = {row.name: row.row for row in old}
    for row in new:
        place = places.setdefault(row.name, len(rows))
        numbered = replace(row, row=place)
        if place == len(rows):
            rows.append(numbered)
            continue
        if place in busy and rows[place] != numbered:
            reason = "waits or runs with other words"
            raise InputError(
                "submit",
                row.name,
                reason,
                fix=f"optbench status {Path(row.folder).parent} --cancel {row.name}",
            )
        rows[place] = numbered
    return rows


def write(path: Path, rows: Sequence[Row]) -> None:
    """Write a grid, whole."""
    atomic.write_text(path, "".join(json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in rows))


def main(argv: Sequence[str]) -> int:
    """Print a row for the batch script."""
    path, number = Path(argv[0]), int(argv[1])
    try:
        rows = read(path)
        if not 0 <= number < len(rows):
            raise InputError(
                str(path), f"{len(rows)} rows", f"has no row {number}", fix="sbatch --array=ROWS"
            )
        folder = rows[number].folder or str(folder_of(rows[number].words))
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    sys.stdout.write("".join(f"{word}\0" for word in (folder, *rows[number].words)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
