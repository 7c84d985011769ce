"""Records of submitted jobs: their scripts, their output, which job was submitted for what, and what SLURM did to it.

They are in ``<run folder>/slurm/`` for one run and in ``<group folder>/slurm/`` for a grid. ``jobs.jsonl`` lists the
submitted jobs; batch scripts append to ``events.tsv`` of the run folder. Torch-free.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Annotated, NamedTuple

from pydantic import Field, TypeAdapter

from harness.config.cluster import ClusterConfig
from harness.errors import InputError
from harness.files import bounded
from harness.files.bounded import MIB, UnreadableFile
from harness.jobs import slurm
from harness.record.folder import JOBS, now

JOURNAL = "jobs.jsonl"
EVENTS = "events.tsv"
SUCCESSORS = "successors"
DEPENDENTS = "dependents"
_LIMIT = 16 * MIB


@dataclass(frozen=True)
class Submitted:
    """A job that was submitted.

    Attributes:
        job: its number.
        kind: train, sweep, or the command that it runs.
        script: file.
        rows: of the grid that its array has; () for other jobs.
        submitted: UTC, ISO 8601.
    """

    job: Annotated[str, Field(pattern=f"^{slurm.JOB}$")]
    kind: str
    script: str
    rows: tuple[int, ...]
    submitted: str

    def task(self, row: int | None) -> str:
        """Return the job number of one row of the array, or of the job itself if ``row`` is None."""
        return self.job if row is None else f"{self.job}_{row}"


_SUBMITTED = TypeAdapter(Submitted)


class Submission:
    """The jobs that were submitted for a run or a group, and the folder of their scripts.

    Args:
        home: the run's or the group's folder.
    """

    def __init__(self, home: Path) -> None:
        self.path = home.absolute() / JOBS

    def jobs(self) -> list[Submitted]:
        """Return all submitted jobs, oldest first, without damaged lines."""
        try:
            text = bounded.read_text(self.path / JOURNAL, _LIMIT, [])
        except (FileNotFoundError, UnreadableFile):
            return []
        entries: list[Submitted] = []
        for line in text.split("\n"):
            try:
                entries.append(_SUBMITTED.validate_json(line))
            except ValueError:
                continue
        return entries

    def add(self, job: str, kind: str, script: Path, rows: Sequence[int] = ()) -> Submitted:
        """Append a submitted job to the journal and return its entry."""
        entry = Submitted(job, kind, str(script), tuple(rows), now())
        with (self.path / JOURNAL).open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(entry)) + "\n")
        return entry

    def logs(self, cluster: ClusterConfig) -> Path:
        """Return the folder of the jobs' output."""
        return Path(cluster.logs).expanduser().absolute() if cluster.logs else self.path / "logs"

    def prepare(self, cluster: ClusterConfig) -> None:
        """Make the folders and check that they can be written: SLURM kills a job whose output can't be written.

        Raises:
            InputError: a folder cannot be written.
        """
        for key, folder in (("runs_dir", self.path), ("cluster.logs", self.logs(cluster))):
            with writing(key, folder):
                folder.mkdir(parents=True, exist_ok=True)
                with tempfile.TemporaryFile(dir=folder) as file:
                    file.write(bytes(4096))  # an exhausted quota still gives names


@contextmanager
def writing(key: str, folder: Path) -> Iterator[None]:
    """Turn the OSError of a full, read-only or forbidden disk into bad input.

    Args:
        key: configuration key that moves ``folder`` to another disk.
        folder: folder that is written to.

    Raises:
        InputError: the operating system refused.
    """
    try:
        yield
    except OSError as error:
        reason = f"cannot be written ({error.strerror or error})"
        raise InputError(key, folder, reason, fix=f"{key}=FOLDER, one that all nodes can write to") from None


class Event(NamedTuple):
    """One line of a run's events.tsv: something that SLURM or a batch script did to the run.

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


def read_events(run: Path) -> list[Event]:
    """Return all events of a run, oldest first, without lines that are torn or damaged."""
    try:
        text = bounded.read_text(run / JOBS / EVENTS, _LIMIT, [])
    except (FileNotFoundError, UnreadableFile):
        return []
    parts = [line.split("\t") for line in text.split("\n")]
    return [Event(p[0], p[1], int(p[2]), p[3], p[4]) for p in parts if len(p) == 5 and _is_event(p)]


def _is_event(parts: list[str]) -> bool:
    try:
        datetime.fromisoformat(parts[0])
    except ValueError:
        return False
    return re.fullmatch(slurm.JOB, parts[1]) is not None and re.fullmatch("[0-9]{1,9}", parts[2]) is not None


def add_event(run: Path, job: str, restarts: int, kind: str, text: str) -> None:
    """Append an event, as the batch script does."""
    (run / JOBS).mkdir(parents=True, exist_ok=True)
    with (run / JOBS / EVENTS).open("a", encoding="utf-8") as file:
        file.write("\t".join([now(), job, str(restarts), kind, " ".join(text.split())]) + "\n")
