"""`optbench clean [DIR]`: list what run folders no longer need, and remove it with ``--yes``. Torch-free.

Only names that this program gives are listed, only below a folder with a run's status.json, and never what is behind
a link. A run that a process is writing to is left alone.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import filelock
from rich.table import Table

from harness import command_line
from harness.console import cell, for_tables
from harness.errors import ExitCode, InputError
from harness.files import locks
from harness.output import json_document
from harness.record.readers import STATUS

DEEPEST = 4
"""Levels of folders below DIR in which runs are looked for: runs_dir/group/name, and one more."""
_REPLACED = re.compile(r"\..+\.replaced-\d{8}-\d{6}-\d{6}")
_UNFINISHED = "written by a process that died"
_FILES = (
    (
        re.compile(r"metrics\.attempt\d+\.jsonl|metrics\.superseded\.jsonl"),
        "rows of steps that were done again",
    ),
    (re.compile(r"metrics\.damaged\.jsonl|moments\.parquet\.unreadable"), "damaged file that was taken out"),
    (re.compile(r"\..+\.[0-9a-f]{8}|\.moments\.parquet\.part"), _UNFINISHED),
)
_CHECKPOINTS = re.compile(r"checkpoints\.attempt\d+")
_PARTIAL = re.compile(r"\.step_\d+\..*partial|\.step_\d+\.old|\.latest\.[0-9a-f]{8}")
_OFFLINE = re.compile(r"(\.?)offline-run-.+")


@dataclass(frozen=True)
class Item:
    """Something that may be removed.

    Attributes:
        path: of a file or a folder.
        kind: what it is, for people.
        bytes: that it takes.
    """

    path: str
    kind: str
    bytes: int


def main(argv: Sequence[str]) -> int:
    """List what may be removed below DIR (``runs``), and remove it with ``--yes``; returns the exit code.

    Raises:
        InputError: no such folder, an unknown option.
    """
    arguments = command_line.parse("clean", argv)
    if len(arguments.rest) > 1:
        folders = " ".join(arguments.rest)
        raise InputError("clean", folders, "is more than one folder", fix="optbench clean runs")
    root = Path(arguments.rest[0] if arguments.rest else "runs")
    if not root.is_dir():
        raise InputError("clean", root, "is not a folder", fix="optbench clean RUNS_DIR")
    items: list[Item] = []
    in_use: list[str] = []
    problems: list[str] = []
    for run in _runs(root):
        with _locked(run) as is_free:
            if not is_free:
                in_use.append(str(run))
                continue
            removable = list(_items(run))
            items += removable
            if arguments.options.yes:
                problems += _remove(removable)
    _show(root, items, in_use, problems, removed=arguments.options.yes, as_json=arguments.options.json)
    return ExitCode.RUN_FAILED if problems else 0


def _runs(root: Path, depth: int = 0) -> Iterator[Path]:
    """Yield run folders, and those that `overwrite=true` moved aside; links are not followed."""
    if (root / STATUS).is_file():
        yield root
        return
    if depth > DEEPEST:
        return
    with contextlib.suppress(OSError):
        for path in sorted(root.iterdir()):
            # What is behind a link is not ours to remove.
            if path.is_dir() and not path.is_symlink():
                yield from _runs(path, depth + 1)


@contextlib.contextmanager
def _locked(run: Path) -> Iterator[bool]:
    """Hold the lock of a run, so that none begins meanwhile; yields False where one is being written."""
    path = run.parent / f".{run.name}.lock"
    if not path.exists():
        yield True  # it was moved or copied here: nobody writes to it by this name
        return
    try:
        # Held while the run's files are listed and removed, so that no attempt starts meanwhile.
        lock = locks.acquire(path, key="clean", timeout=0)
    except (filelock.Timeout, OSError, InputError):
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


def _items(run: Path) -> Iterator[Item]:
    """Yield what of a run may be removed."""
    if _REPLACED.fullmatch(run.name):
        yield _item(run, "run that overwrite=true replaced")
        return
    for path in sorted(run.iterdir()):
        kind = next((kind for pattern, kind in _FILES if pattern.fullmatch(path.name)), None)
        if _CHECKPOINTS.fullmatch(path.name) and _is_folder(path):
            yield _item(path, "checkpoints that later attempts did not resume from")
        elif kind is not None and not _is_folder(path):
            yield _item(path, kind)
    for path in _entries(run / "checkpoints"):
        if _PARTIAL.fullmatch(path.name):
            yield _item(path, _UNFINISHED)
    for path in _entries(run / "wandb"):
        matched = _OFFLINE.fullmatch(path.name)
        if matched is None or not _is_folder(path):
            continue
        if matched[1]:
            yield _item(path, "W&B files of an earlier attempt, whose rows the later one has")
        elif list(path.glob("*.synced")):
            yield _item(path, "W&B files that are on the server")


def _entries(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if _is_folder(folder) else []


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _item(path: Path, kind: str) -> Item:
    return Item(str(path), kind, _size(path))


def _size(path: Path) -> int:
    """Return the bytes of a file, or of all files below a folder; links count as themselves."""
    if not _is_folder(path):
        return path.lstat().st_size
    total = 0
    # os.walk does not follow links to folders, so nothing is counted twice.
    for folder, _, names in os.walk(path):
        for name in names:
            with contextlib.suppress(OSError):
                total += (Path(folder) / name).lstat().st_size
    return total


def _remove(items: Sequence[Item]) -> list[str]:
    """Remove what is listed; returns what could not be, a line each."""
    problems = []
    for item in items:
        path = Path(item.path)
        try:
            if _is_folder(path):
                shutil.rmtree(path)
            else:
                path.unlink()
        except OSError as error:
            problems.append(f"{error.filename or path}: {error.strerror or error}")
    return problems


def _show(
    root: Path,
    items: Sequence[Item],
    in_use: Sequence[str],
    problems: Sequence[str],
    *,
    removed: bool,
    as_json: bool,
) -> None:
    total = sum(item.bytes for item in items)
    if as_json:
        lists = {
            "items": [asdict(item) for item in items],
            "in_use": list(in_use),
            "problems": list(problems),
        }
        print(json_document(root=str(root), removed=removed, total_bytes=total, **lists))
        return
    table = Table("what", "MB", "path", box=None)
    table.columns[1].justify = "right"
    for item in items:
        table.add_row(cell(item.kind), f"{item.bytes / 1e6:.1f}", cell(item.path))
    console = for_tables()
    if items:
        console.print(table)
    for run in in_use:
        print(f"left alone, a process is writing to it: {run}", file=sys.stderr)
    for problem in problems:
        print(f"not removed: {problem}", file=sys.stderr)
    if not items:
        console.print("nothing to remove")
    elif removed:
        console.print(f"removed {len(items) - len(problems)} of {len(items)}: {total / 1e6:.1f} MB")
    else:
        console.print(f"{total / 1e6:.1f} MB; nothing is removed without --yes")
