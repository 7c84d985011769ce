"""Leases: a file per run that its job keeps fresh, so that two jobs never train one run at the same time.

    python -m harness.jobs.leases FILE JOB     # exit code 0: JOB has it now; 75: another job has it

The lock of the run folder (`harness.record.folder`) is the operating system's, which some shared file systems fail
to pass from node to node. A lease needs only exclusive creation and renaming. Torch-free.
"""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from harness.files import atomic, bounded
from harness.files.bounded import UnreadableFile
from harness.jobs import slurm

FRESH_S = 90.0
"""Age, s, at which a lease counts as abandoned; the batch script touches it every 20 s."""
PATIENCE_S = 120.0
"""How long, s, a job waits for a lease: long enough for one to become abandoned."""
POLL_S = 2.0
HELD = 75
"""Exit code: another job has the lease. Not 1, with which Python ends after any error."""


class Lease(NamedTuple):
    """The content of a lease file.

    Attributes:
        job: number of the job that holds it.
        token: random, different for each lease.
    """

    job: str
    token: str


def path_of(run_folder: Path) -> Path:
    """Return the file of a run's lease, next to the run folder like the lock."""
    return run_folder.with_name(f".{run_folder.name}.lease")


def holder(path: Path) -> Lease | None:
    """Return the content of a lease file, fresh or not; None if there is none or it is damaged."""
    try:
        content = bounded.read_json(path, [])
        return Lease(str(content["job"]), str(content["token"]))
    except (FileNotFoundError, UnreadableFile, KeyError, TypeError):
        return None


def age_s(path: Path) -> float:
    """Return the seconds since a file was touched, by the clock of its file system; infinite if it is gone."""
    probe = path.with_name(f".{path.name}.{secrets.token_hex(4)}.clock")
    try:
        probe.touch()
        return probe.stat().st_mtime - path.stat().st_mtime
    except FileNotFoundError:
        return float("inf")
    finally:
        probe.unlink(missing_ok=True)


def take(path: Path, job: str, is_gone: Callable[[str], bool] = lambda job: False) -> bool:
    """Take a lease that is free, our own, or abandoned; of several jobs that try at once, one gets it.

    Args:
        path: of the lease.
        job: number of the job that takes it.
        is_gone: returns True for a job that certainly has ended, whose lease need not grow old first.

    Returns:
        True if ``job`` holds the lease now.
    """
    mine = {"job": job, "token": secrets.token_hex(8), "taken": time.time()}
    if _created(path, json.dumps(mine)):
        return True
    lease = holder(path)
    if lease is None and age_s(path) < FRESH_S:
        return False  # being written, or just given back: the next attempt decides
    if lease is not None and lease.job == job:
        os.utime(path)
        return True
    if lease is not None and age_s(path) < FRESH_S and not is_gone(lease.job):
        return False
    return _take_over(path, lease, mine)


def _take_over(path: Path, abandoned: Lease | None, mine: dict[str, object]) -> bool:
    """Replace an abandoned lease; only the job that creates the mark of that lease may, so no fresh one is replaced."""
    mark = path.with_name(f"{path.name}.{abandoned.token if abandoned else 'damaged'}.over")
    if not _created(mark, ""):
        return False
    try:
        if holder(path) != abandoned:
            return False
        atomic.write_json(path, mine)
        return True
    finally:
        mark.unlink(missing_ok=True)


def _created(path: Path, text: str) -> bool:
    """Create a file with its whole text, and return False if it exists already."""
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    part.write_text(text)
    try:
        os.link(part, path)  # fails if the name is taken, on every file system that has links
    except FileExistsError:
        return False
    finally:
        part.unlink()
    return True


def _is_gone(job: str) -> bool:
    """Return True if SLURM says that a job has ended; False if SLURM can't be asked (in a container)."""
    if not slurm.is_job(job):
        return False  # a damaged lease: only its age tells
    argv = (
        "squeue",
        "--noheader",
        "--states=RUNNING,COMPLETING,SUSPENDED,CONFIGURING",
        "--format=%i",
        f"--jobs={job}",
    )
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return False
    unknown = done.returncode != 0 and "Invalid job id" in done.stderr
    return unknown or (done.returncode == 0 and not done.stdout.strip())


def main(argv: Sequence[str]) -> int:
    """Wait up to `PATIENCE_S` for a lease, and return 0 or `HELD`."""
    path, job = Path(argv[0]), argv[1]
    path.parent.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + PATIENCE_S
    while not take(path, job, _is_gone):
        lease = holder(path)
        if time.monotonic() > deadline:
            print(f"{path}: held by job {lease.job if lease else '?'}, which keeps it fresh", file=sys.stderr)
            return HELD
        time.sleep(POLL_S)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
