"""Marks that a command and the processes of its run leave for each other: who started, who ended, which signal came.

Each process marks its start and its end, however it ends. A process with a start and no end was killed from outside,
ran out of memory or crashed in native code; of a crash, Python's fault handler leaves the stacks of all threads. The
errors of the other processes name the broken connection, not that rank. The command notes the signal that asked it to
stop, because it passes every signal on as SIGTERM. Torch-free.
"""

from __future__ import annotations

import faulthandler
import json
import os
import re
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

FOLDER_VARIABLE = "OPTBENCH_EXIT_MARKERS"
"""Environment variable with the folder of the marks; without it no process makes any."""
ERROR_VARIABLE = "OPTBENCH_ERROR_FILE"
"""Environment variable with the file in which rank 0 leaves bad input for the command that started it."""
MOST_OF_A_CRASH = 1 << 20
"""Characters of a crash's stacks that are kept."""
_FAULT = re.compile(r"Fatal Python error: (.+)")
_SIGNAL_FILE = "asked"
_READABLE = {"SIGINT": "Ctrl-C (SIGINT)", "SIGHUP": "SIGHUP (the terminal was closed)"}


@contextmanager
def marked() -> Iterator[None]:
    """Mark the start and the end of the enclosed work of a training process."""
    folder = os.environ.get(FOLDER_VARIABLE)
    if folder is None:
        yield
        return
    mark = Path(folder) / f"rank{os.environ.get('RANK', '0')}"
    mark.with_suffix(".started").touch()
    with mark.with_suffix(".crash").open("w") as stacks:
        # Not in a process with a handler of its own, such as a test's.
        is_ours = not faulthandler.is_enabled()
        if is_ours:
            faulthandler.enable(stacks)
        try:
            yield
        finally:
            if is_ours:
                faulthandler.disable()
            mark.with_suffix(".ended").touch()


def missing_ranks(folder: Path) -> dict[int, str]:
    """Return rank → stacks of its crash, or "", of the ranks that marked their start and not their end; ascending."""
    started = {int(path.stem.removeprefix("rank")) for path in folder.glob("rank*.started")}
    return {
        rank: _stacks(folder / f"rank{rank}.crash")
        for rank in sorted(started)
        if not (folder / f"rank{rank}.ended").exists()
    }


def describe_missing(missing: Mapping[int, str]) -> str:
    """Return one line that names the ranks that ended without a mark, and how, as far as that is known."""
    ways: dict[str, list[int]] = {}
    for rank, stacks in missing.items():
        fault = _FAULT.match(stacks)
        way = (
            f"crashed in native code ({fault[1]})"
            if fault
            else "ended unexpectedly (killed, or out of memory)"
        )
        ways.setdefault(way, []).append(rank)
    return "; ".join(
        f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))} {way}"
        for way, ranks in ways.items()
    )


def _stacks(path: Path) -> str:
    try:
        return path.read_text(errors="replace")[:MOST_OF_A_CRASH]
    except OSError:
        return ""


def note_signal(folder: Path, number: signal.Signals) -> None:
    """Write the signal that asked a command to stop, for the processes of its run."""
    with suppress(OSError):
        (folder / _SIGNAL_FILE).write_text(number.name)


def requested_signal() -> signal.Signals | None:
    """Return the signal that asked the command to stop; None if the command noted none."""
    folder = os.environ.get(FOLDER_VARIABLE)
    try:
        return None if folder is None else signal.Signals[(Path(folder) / _SIGNAL_FILE).read_text()]
    except (OSError, KeyError):
        return None


def signal_name(number: signal.Signals) -> str:
    """Return the name of a signal, with the key or event that sends it."""
    return _READABLE.get(number.name, number.name)


def write_error(fields: Mapping[str, Any]) -> None:
    """Write bad input for the command that started this process, if it waits for that."""
    if ERROR_VARIABLE in os.environ:
        with suppress(OSError):
            Path(os.environ[ERROR_VARIABLE]).write_text(json.dumps(fields))
