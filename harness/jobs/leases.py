"""Who trains a run: a file that its job keeps fresh, so that two jobs never train one run at the same time.

    python -m harness.jobs.leases FILE JOB     # exit code 0: JOB has it now; 75: another job has it

The run folder's lock (`harness.record.folder`) is the operating system's, which some shared file systems do not pass
from node to node; this needs nothing but exclusive creation and renaming. Torch-free.
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
"""A lease that nobody touched for so long is abandoned; the batch script touches it every 20 s."""
PATIENCE_S = 120.0
"""How long a job waits for a lease: long enough for one to be abandoned."""
POLL_S = 2.0
HELD = 75
"""Exit code: another job has the lease. Not 1, with which Python ends after any error."""


class Lease(NamedTuple):
    """Attributes: job: that holds it; token: of this very lease."""

    job: str
    token: str


def path_of(run_folder: Path) -> Path:
    """Where the lease of a run lies: beside its folder, like the lock."""
    return run_folder.with_name(f".{run_folder.name}.lease")


def holder(path: Path) -> Lease | None:
    """Whose lease it is, fresh or not; None: nobody's."""
    try:
        content = bounded.read_json(path, [])
        return Lease(str(content["job"]), str(content["token"]))
    except (FileNotFoundError, UnreadableFile, KeyError, TypeError):
        return None


def age_s(path: Path) -> float:
    """Seconds since a file was touched, by the clock of its file system; infinite if it is gone."""
    probe = path.with_name(f".{path.name}.{secrets.token_hex(4)}.clock")
    try:
        probe.touch()
        return probe.stat().st_mtime - path.stat().st_mtime
    except FileNotFoundError:
        return float("inf")
    finally:
        probe.unlink(missing_ok=True)


def take(path: Path, job: str, is_gone: Callable[[str], bool] = lambda job: False) -> bool:
    """Take the lease if it is free, our own, or abandoned.

    Args:
        path: of the lease.
        job: who takes it.
        is_gone: whether a job certainly runs no more, so that its lease need not grow old first.

    Returns:
        Whether it is ours now. Of several jobs that call this at once, one gets it.
    """
    mine = {"job": job, "token": secrets.token_hex(8), "taken": time.time()}
    if _created(path, json.dumps(mine)):
        return True
    found = holder(path)
    if found is None and age_s(path) < FRESH_S:
        return False  # being written, or just given back: the next try tells
    if found is not None and found.job == job:
        os.utime(path)
        return True
    if found is not None and age_s(path) < FRESH_S and not is_gone(found.job):
        return False
    return _take_over(path, found, mine)


def _take_over(path: Path, found: Lease | None, mine: dict[str, object]) -> bool:
    """Replace an abandoned lease. Only who made the mark of that very lease may, so that no fresh one is replaced."""
    mark = path.with_name(f"{path.name}.{found.token if found else 'damaged'}.over")
    if not _created(mark, ""):
        return False
    try:
        if holder(path) != found:
            return False
        atomic.write_json(path, mine)
        return True
    finally:
        mark.unlink(missing_ok=True)


def _created(path: Path, text: str) -> bool:
    """Write a file that is not there yet, whole; False if it is there."""
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
    """Whether SLURM says that a job does not run; False where SLURM can't be asked (in a container)."""
    if not slurm.is_job(job):
        return False  # damaged: only age tells
    words = (
        "squeue",
        "--noheader",
        "--states=RUNNING,COMPLETING,SUSPENDED,CONFIGURING",
        "--format=%i",
        f"--jobs={job}",
    )
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return False
    unknown = done.returncode != 0 and "Invalid job id" in done.stderr
    return unknown or (done.returncode == 0 and not done.stdout.strip())


def main(argv: Sequence[str]) -> int:
    """Wait up to `PATIENCE_S` for a lease."""
    path, job = Path(argv[0]), argv[1]
    path.parent.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + PATIENCE_S
    while not take(path, job, _is_gone):
        found = holder(path)
        if time.monotonic() > deadline:
            print(f"{path}: held by job {found.job if found else '?'}, which keeps it fresh", file=sys.stderr)
            return HELD
        time.sleep(POLL_S)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
