"""Which process of a run died without saying so: killed from outside, out of memory, a crash in native code.

Each process marks that it has started and that it has ended, however it ended; one that only started died without
a word. The other processes' errors name the connection that broke, not the rank behind it. Torch-free.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

FOLDER = "OPTBENCH_LAST_WORDS"
"""Environment variable: where the marks go; without it none are made."""


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
