"""Calls of SLURM's own commands; never `sacct`, which many clusters do not have. Torch-free."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from harness.errors import InputError

TIMEOUT_S = 60
JOB = "[0-9]{1,18}(_[0-9]{1,9})?"
"""Regular expression of the number of a job, or of a row of an array: ``12``, ``12_3``."""
_KEYS = {
    "partition": ("partition",),
    "account": ("account",),
    "qos": ("qos",),
    "constraint": ("feature",),
    "time": ("time limit",),
    "gpus": ("generic resource", "gres"),
    "memory": ("memory",),
    "nodes": ("node count", "node configuration"),
}
"""Key of the cluster → words of SLURM's message when it refuses the value."""


class ArrayTask(NamedTuple):
    """A job, or a row of an array, that SLURM knows.

    Attributes:
        state: PENDING, RUNNING, COMPLETED, CANCELLED …
        reason: why it waits or ended so; "" if there is none.
        restarts: how often it was requeued.
        nodes: its nodes; "" while it waits.
    """

    state: str
    reason: str
    restarts: int
    nodes: str

    @property
    def is_over(self) -> bool:
        """Return True if the job will not run again by itself."""
        return self.state not in ALIVE


ALIVE = (
    "PENDING",
    "RUNNING",
    "SUSPENDED",
    "CONFIGURING",
    "COMPLETING",
    "REQUEUED",
    "REQUEUE_HOLD",
    "RESIZING",
)
ALIVE += ("SIGNALING", "STAGE_OUT", "STOPPED", "SPECIAL_EXIT", "REQUEUE_FED")
"""States of a job that is not over."""


def require() -> None:
    """Raise an error without SLURM's commands.

    Raises:
        InputError: there is no sbatch.
    """
    if shutil.which("sbatch") is None:
        reason = "is not on PATH: this machine is not a login node of a SLURM cluster"
        raise InputError(
            "submit", "sbatch", reason, fix="--dry-run prints the script; submit it on a login node"
        )


def is_here() -> bool:
    """Return True if SLURM's commands are on PATH."""
    return shutil.which("squeue") is not None


def try_out(text: str, cluster: dict[str, object]) -> None:
    """Let SLURM check a script without queueing it (``sbatch --test-only``).

    Args:
        text: of the script.
        cluster: `ClusterConfig` as a mapping, to name the key whose value SLURM refuses.

    Raises:
        InputError: SLURM would refuse it.
    """
    with tempfile.NamedTemporaryFile("w", suffix=".sbatch") as file:
        file.write(text)
        file.flush()
        done = _call("sbatch", "--test-only", file.name)
    if done.returncode:
        raise _refusal(done.stderr, cluster)


def submit(script: Path, *flags: str, cluster: dict[str, object] | None = None) -> str:
    """Queue a script and return the job's number.

    Args:
        script: its file.
        flags: options of sbatch, which win over the script's own.
        cluster: as for `try_out`.

    Raises:
        InputError: SLURM refuses it.
    """
    done = _call("sbatch", "--parsable", *flags, str(script))
    if done.returncode:
        raise _refusal(done.stderr, cluster or {})
    return done.stdout.strip().split(";")[0]


def is_job(job: str) -> bool:
    """Return True for the number of a job or a row; a file may hold anything, and ``--user=…`` would be a flag."""
    return re.fullmatch(JOB, job) is not None


def cancel(job: str) -> None:
    """Cancel a job or a row of an array (``12``, ``12_3``).

    Raises:
        InputError: SLURM refuses.
    """
    if not is_job(job):
        raise InputError("cancel", job, "is not the number of a job", allowed="12 or 12_3")
    done = _call("scancel", job)
    if done.returncode:
        raise InputError("cancel", job, f"is refused by SLURM ({_line(done.stderr)})")


def tasks(jobs: Sequence[str]) -> dict[str, ArrayTask]:
    """Return the state of the jobs and rows that SLURM still knows; {} if SLURM is absent or does not answer.

    `scontrol` remembers ended jobs for some minutes.

    Args:
        jobs: ``12`` or ``12_3``.
    """
    jobs = [job for job in jobs if is_job(job)]
    if not jobs or not is_here():
        return {}
    known: dict[str, ArrayTask] = {}
    numbers = sorted({job.partition("_")[0] for job in jobs}, key=int)
    for number in numbers:
        text = _call("scontrol", "--all", "show", "job", "-o", number)
        if text.returncode == 0:
            for line in text.stdout.splitlines():
                known |= _tasks_of_line(line)
    return {job: known[job] for job in jobs if job in known}


def require_answer(jobs: Sequence[str]) -> None:
    """Check that SLURM answers for jobs; one that it no longer knows has ended.

    Raises:
        InputError: `scontrol` fails otherwise.
    """
    for number in sorted({job.partition("_")[0] for job in jobs if is_job(job)}, key=int):
        done = _call("scontrol", "--all", "show", "job", "-o", number)
        if done.returncode and "Invalid job id" not in done.stderr:
            reason = f"does not say whether job {number} has ended ({_line(done.stderr)})"
            raise InputError("submit", "scontrol", reason, fix="the same command again, when SLURM answers")


def _tasks_of_line(line: str) -> dict[str, ArrayTask]:
    facts = dict(re.findall(r"(\w+)=(\S*)", line))
    reason = facts.get("Reason", "None")
    restarts = int(facts.get("Restarts") or 0)
    nodes = facts.get("NodeList", "")
    nodes = "" if nodes in ("(null)", "None") else nodes
    task = ArrayTask(facts.get("JobState", "UNKNOWN"), "" if reason == "None" else reason, restarts, nodes)
    if "ArrayJobId" not in facts:
        return {facts["JobId"]: task}
    # Rows that wait together are one line: ArrayTaskId=0-2,5%4.
    return {f"{facts['ArrayJobId']}_{row}": task for row in expanded(facts.get("ArrayTaskId", ""))}


def expanded(rows: str) -> list[int]:
    """Return the row numbers of an array in SLURM's notation: ``0-2,5%4`` → 0, 1, 2, 5."""
    numbers: list[int] = []
    for span in rows.partition("%")[0].split(","):
        if match := re.fullmatch(r"(\d+)(?:-(\d+)(?::(\d+))?)?", span):
            first, last, stride = match.groups()
            numbers += range(int(first), int(last or first) + 1, int(stride or 1))
    return numbers


def _refusal(message: str, cluster: dict[str, object]) -> InputError:
    text = _line(message)
    key = next((key for key, words in _KEYS.items() if any(word in text.lower() for word in words)), None)
    if key is None:
        return InputError("submit", "sbatch", f"refuses the job ({text})", fix="--dry-run shows the script")
    value = cluster.get(key)
    allowed = _partitions() if key == "partition" else ()
    fix = f"cluster.{key}={allowed[0]}" if allowed else f"cluster.{key}=…"
    shown = "null" if value is None else str(value)
    return InputError(f"cluster.{key}", shown, f"is refused by SLURM ({text})", allowed=allowed, fix=fix)


def _partitions() -> list[str]:
    done = _call("sinfo", "-h", "-o", "%R")
    return list(dict.fromkeys(done.stdout.split())) if done.returncode == 0 else []


def _line(message: str) -> str:
    """Return the message of a SLURM command in one line without the command's name."""
    lines = [re.sub(r"^\w+: (error: )?", "", line).strip() for line in message.splitlines()]
    return "; ".join(dict.fromkeys(line for line in lines if line)) or "no reason given"


def _call(*words: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(words, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return subprocess.CompletedProcess(words, 1, "", f"{words[0]}: {error}")
