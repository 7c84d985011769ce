"""The lines that batch scripts leave in ``<run folder>/slurm/events.tsv``: what SLURM did to a run. Torch-free."""

from __future__ import annotations

import re
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

from harness.files import bounded
from harness.files.bounded import MIB, UnreadableFile
from harness.record.folder import JOBS, now

FILE = "events.tsv"
JOB = "[0-9]{1,18}(_[0-9]{1,9})?"
"""Regular expression of the number of a job, or of a row of an array: ``12``, ``12_3``."""
_LIMIT = 16 * MIB


class Event(NamedTuple):
    """One line.

    Attributes:
        time: UTC, ISO 8601.
        job: ``12`` or ``12_3``.
        restarts: how often the job had been queued again.
        kind: started, waiting, preflight, resubmitted, requeued, preempted, cancelled, ended (by SLURM), stopped,
            finished or failed.
        text: for people.
    """

    time: str
    job: str
    restarts: int
    kind: str
    text: str


def read(run: Path) -> list[Event]:
    """All events of a run, oldest first; a line that is torn or damaged is left out."""
    try:
        text = bounded.read_text(run / JOBS / FILE, _LIMIT, [])
    except (FileNotFoundError, UnreadableFile):
        return []
    parts = [line.split("\t") for line in text.split("\n")]
    return [Event(p[0], p[1], int(p[2]), p[3], p[4]) for p in parts if len(p) == 5 and _is_event(p)]


def _is_event(parts: list[str]) -> bool:
    try:
        datetime.fromisoformat(parts[0])
    except ValueError:
        return False
    return re.fullmatch(JOB, parts[1]) is not None and re.fullmatch("[0-9]{1,9}", parts[2]) is not None


def add(run: Path, job: str, restarts: int, kind: str, text: str) -> None:
    """Append a line, as the batch script does."""
    (run / JOBS).mkdir(parents=True, exist_ok=True)
    with (run / JOBS / FILE).open("a", encoding="utf-8") as file:
        file.write("\t".join([now(), job, str(restarts), kind, " ".join(text.split())]) + "\n")
