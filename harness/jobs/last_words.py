"""What a command and the processes of its run leave for each other in a folder: who started and ended, who asked.

Each process marks that it has started and that it has ended, however it ended; one that only started died without
a word: killed from outside, out of memory, a crash in native code. The other processes' errors name the connection
that broke, not the rank behind it. The command notes the signal that it was asked to stop by, because it passes
every one of them on as SIGTERM. Torch-free.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

FOLDER = "OPTBENCH_LAST_WORDS"
"""Environment variable: where the marks go; without it none are made."""
_ASKED = "asked"
_FOR_PEOPLE = {"SIGINT": "Ctrl-C (SIGINT)", "SIGHUP": "SIGHUP (the terminal was closed)"}


@contextmanager
def marked() -> Iterator[None]:
    """Around the work of a training process."""
    folder = os.environ.get(FOLDER)
    if folder is None:
        yield
        return
    mark = Path(folder) / f"rank{os.environ.get('RANK', '0')}"
    mark.with_suffix(".started").touch()
    try:
        yield
    finally:
        mark.with_suffix(".ended").touch()


def silent(folder: Path) -> list[int]:
    """Ranks that started and did not end."""
    started = {int(path.stem.removeprefix("rank")) for path in folder.glob("rank*.started")}
    return sorted(rank for rank in started if not (folder / f"rank{rank}.ended").exists())


def told(ranks: list[int]) -> str:
    """A line about ranks that died without a word."""
    who = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"
    return f"{who} died without a word (killed, or out of memory)"


def note_asked(folder: Path, number: signal.Signals) -> None:
    """Leave the signal that a command was asked to stop by, for the run's processes."""
    with suppress(OSError):
        (folder / _ASKED).write_text(number.name)


def asked() -> signal.Signals | None:
    """Return the signal that the command was asked to stop by; None if it left none."""
    folder = os.environ.get(FOLDER)
    try:
        return None if folder is None else signal.Signals[(Path(folder) / _ASKED).read_text()]
    except (OSError, KeyError):
        return None


def describe(number: signal.Signals) -> str:
    """Return the name of a signal, with the key or event that sends it."""
    return _FOR_PEOPLE.get(number.name, number.name)
