"""The grid of an array job: a file with one run per row, whose row numbers never change.

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

from harness.errors import InputError
from harness.files import atomic, bounded
from harness.files.bounded import MIB, JsonDecoder, UnreadableFile
from harness.jobs.folder import folder_of

FILE = "grid.jsonl"
_LIMIT = 64 * MIB


@dataclass(frozen=True)
class GridRow:
    """One run of a grid.

    Attributes:
        words: overrides of the run, without world_size.
        row: its number in the array.
        name: of the run, unique in the grid; this and the next two are "" in a grid made by hand.
        folder: of the run.
        identity: of the run (`harness.config.identity`).
    """

    words: tuple[str, ...]
    row: int
    name: str = ""
    folder: str = ""
    identity: str = ""


_ROW, _DECODER = TypeAdapter(GridRow), JsonDecoder()


def read(path: Path) -> list[GridRow]:
    """Return the rows of a grid; none if there is no file.

    Raises:
        InputError: the file is damaged.
    """
    try:
        text = bounded.read_text(path, _LIMIT, [])
    except FileNotFoundError:
        return []
    except UnreadableFile as error:
        raise InputError(str(path), "the grid", f"can't be read: {error}", fix=f"remove {path}") from None
    rows: list[GridRow] = []
    for number, line in enumerate(text.rstrip("\n").split("\n") if text else ()):
        try:
            rows.append(_ROW.validate_python({"row": number, **_DECODER.decode(line)}))
        except (ValueError, TypeError):
            raise InputError(
                str(path), f"line {number + 1}", "is not a row of a grid", fix=f"remove {path}"
            ) from None
        if rows[-1].row != number:
            raise InputError(
                str(path),
                f"line {number + 1}",
                f"is numbered {rows[-1].row}, not {number}",
                fix=f"remove {path}",
            )
    return rows


def merged(old: Sequence[GridRow], new: Sequence[GridRow], busy: Sequence[int]) -> list[GridRow]:
    """Return the rows of an earlier grid, updated by name from ``new``, followed by those that it did not have.

    A row keeps its number.

    Args:
        old: rows of the file.
        new: rows that are wanted now; their numbers do not matter.
        busy: numbers of rows that wait or run, whose words must not change.

    Raises:
        InputError: a busy row has other words now.
    """
    rows = list(old)
    numbers = {row.name: row.row for row in old}
    for row in new:
        number = numbers.setdefault(row.name, len(rows))
        numbered = replace(row, row=number)
        if number == len(rows):
            rows.append(numbered)
            continue
        if number in busy and _sorted(rows[number]) == _sorted(numbered):
            continue  # in another order, such as of the job after the trials of a sweep
        if number in busy and rows[number] != numbered:
            reason = "waits or runs with other arguments"
            raise InputError(
                "submit",
                row.name,
                reason,
                fix=f"optbench status {Path(row.folder).parent} --cancel {row.name}",
            )
        rows[number] = numbered
    return rows


def _sorted(row: GridRow) -> GridRow:
    return replace(row, words=tuple(sorted(row.words)))


def write(path: Path, rows: Sequence[GridRow]) -> None:
    """Write a grid to a file."""
    atomic.write_text(path, "".join(json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in rows))


def main(argv: Sequence[str]) -> int:
    """Print the folder and the words of a row for the batch script."""
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
