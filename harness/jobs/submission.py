"""What is kept of submitted jobs: the folder of their scripts and output, and which job was submitted for what.

``<run folder>/slurm/`` for one run, ``<group folder>/slurm/`` for a grid. Torch-free.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field, TypeAdapter

from harness.config.cluster import ClusterConfig
from harness.config.errors import InputError
from harness.files import bounded
from harness.files.bounded import MIB, UnreadableFile
from harness.jobs import history
from harness.record.folder import JOBS, now

JOURNAL = "jobs.jsonl"
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

    job: Annotated[str, Field(pattern=f"^{history.JOB}$")]
    kind: str
    script: str
    rows: tuple[int, ...]
    submitted: str

    def task(self, row: int | None) -> str:
        """The job's name for SLURM, of one row."""
        return self.job if row is None else f"{self.job}_{row}"


_SUBMITTED = TypeAdapter(Submitted)


class Submission:
    """The folder of jobs of a run or of a group.

    Args:
        home: the run's or the group's folder.
    """

    def __init__(self, home: Path) -> None:
        self.path = home.absolute() / JOBS

    def jobs(self) -> list[Submitted]:
        """All that were submitted, oldest first; a damaged line is left out."""
        try:
            text = bounded.read_text(self.path / JOURNAL, _LIMIT, [])
        except (FileNotFoundError, UnreadableFile):
            return []
        found: list[Submitted] = []
        for line in text.split("\n"):
            try:
                found.append(_SUBMITTED.validate_json(line))
            except ValueError:
                continue
        return found

    def add(self, job: str, kind: str, script: Path, rows: Sequence[int] = ()) -> Submitted:
        """Note a job."""
        entry = Submitted(job, kind, str(script), tuple(rows), now())
        with (self.path / JOURNAL).open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(entry)) + "\n")
        return entry

    def logs(self, cluster: ClusterConfig) -> Path:
        """Folder of the jobs' output."""
        return Path(cluster.logs).expanduser().absolute() if cluster.logs else self.path / "logs"

    def prepare(self, cluster: ClusterConfig) -> None:
        """Make the folders, and see that they can be written: a job whose output can't be written dies without a word.

        Raises:
            InputError: one cannot.
        """
        for key, folder in (("runs_dir", self.path), ("cluster.logs", self.logs(cluster))):
            with writing(key, folder):
                folder.mkdir(parents=True, exist_ok=True)
                with tempfile.TemporaryFile(dir=folder) as file:
                    file.write(bytes(4096))  # an exhausted quota still gives names


@contextmanager
def writing(key: str, folder: Path) -> Iterator[None]:
    """Turn what a full, read-only or forbidden disk answers into bad input.

    Args:
        key: configuration key that moves ``folder`` to another disk.
        folder: that is written to.

    Raises:
        InputError: the operating system refused.
    """
    try:
        yield
    except OSError as error:
        reason = f"cannot be written ({error.strerror or error})"
        raise InputError(key, folder, reason, fix=f"{key}=a folder that all nodes can write to") from None
