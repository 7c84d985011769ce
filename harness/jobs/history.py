"""The lines that batch scripts leave in ``<run folder>/slurm/events.tsv``: what SLURM did to a run. Torch-free."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from harness.record.folder import JOBS, now

FILE = "events.tsv"


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
    """All events of a run, oldest first; a torn line is left out."""
    try:
        lines = (run / JOBS / FILE).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    parts = [line.split("\t") for line in lines]
    return [Event(p[0], p[1], int(p[2]), p[3], p[4]) for p in parts if len(p) == 5 and p[2].isdecimal()]


def add(run: Path, job: str, restarts: int, kind: str, text: str) -> None:
    """Append a line, as the batch script does."""
    (run / JOBS).mkdir(parents=True, exist_ok=True)
    with (run / JOBS / FILE).open("a", encoding="utf-8") as file:
        file.write("\t".join([now(), job, str(restarts), kind, " ".join(text.split())]) + "\n")
