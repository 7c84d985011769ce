"""How a run ended, once its processes have: complete status.json where rank 0 could not, and give the exit code.

    python -m harness.jobs.outcome FOLDER CODE [SIGNAL] [began=SECONDS]     # called by batch scripts

CODE is the launcher's exit code; SIGNAL is the one that the script was told to stop by; SECONDS is the Unix time before
the processes were started, so that the status of an earlier attempt is not taken for this one's. Torch-free.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

import filelock

from harness.errors import ExitCode, InputError
from harness.files import atomic, locks
from harness.process import exit_markers
from harness.process.gpu_environment import FLIGHT_RECORDER
from harness.record import folder as run_folder
from harness.record import readers
from harness.record.folder import REQUEUE, now
from harness.record.readers import SILENT, Status

EXIT_CODES = {
    "finished": ExitCode.DONE,
    "diverged": ExitCode.RUN_FAILED,
    "failed": ExitCode.RUN_FAILED,
    "interrupted": ExitCode.RESUMABLE,
}
"""Exit code of `optbench` by the state that a run ended in."""
CRASHES = "crash"
"""Folder below a run folder for the stacks of processes that crashed: ``rank_0.txt``, …"""
LOCK_S = 2.0
"""How long to wait for the lock of a folder whose processes have ended: the lock of a killed process is freed late."""


@dataclass(frozen=True)
class RunOutcome:
    """How a run ended.

    Attributes:
        folder: its run folder.
        state: finished, diverged, failed or interrupted.
        exit_code: `EXIT_CODES` of the state.
        reason: one line.
    """

    folder: Path
    state: str
    exit_code: int
    reason: str


def finalize(
    folder: Path,
    code: int,
    missing: Mapping[int, str],
    received: signal.Signals | None,
    began: float = 0.0,
) -> RunOutcome:
    """Complete status.json of a run whose processes have ended, and return how the run ended.

    Only the holder of the folder's lock edits it: another process may be training this run.

    Args:
        folder: of the run.
        code: exit code of the launcher.
        missing: ranks that started and left no end marker, with the stacks of a crash (`exit_markers`).
        received: the signal that the command was told to stop by.
        began: Unix time before the processes started; an older status.json is of an earlier attempt.
    """
    early = "before the first step"
    if received is not None:
        unknown = RunOutcome(
            folder,
            "interrupted",
            ExitCode.RESUMABLE,
            f"stopped by {exit_markers.signal_name(received)} {early}",
        )
    else:
        unknown = RunOutcome(folder, "failed", 3, f"the processes ended with code {code} {early}")
    if not (folder / readers.STATUS).is_file():
        return unknown
    try:
        lock = locks.acquire(run_folder.lock_file(folder), key="runs_dir", timeout=LOCK_S)
    except filelock.Timeout:
        return replace(unknown, reason=f"{unknown.reason}; another process is training this run")
    except (InputError, OSError):
        lock = None  # the folder cannot be written, but it can be read
    try:
        status, _ = readers.status(folder)
        if status is None or not status.attempts or not _is_since(status.updated, began):
            return unknown
        return _completed(folder, status, code, missing, received, began, may_edit=lock is not None)
    finally:
        if lock is not None:
            lock.release()


def _completed(
    folder: Path,
    status: Status,
    code: int,
    missing: Mapping[int, str],
    received: signal.Signals | None,
    began: float,
    *,
    may_edit: bool,
) -> RunOutcome:
    """Return the outcome that status.json tells, after adding what rank 0 could not write."""
    attempt, step = status.attempts[-1], status.step or 0
    is_requeued = False
    if may_edit:
        with suppress(OSError):
            _keep_stacks(folder, missing)
    if status.state == "running" and (folder / run_folder.DONE).exists():
        # Killed between writing DONE and status.json.
        _end(status, "finished", "all steps done")
    elif status.state == "running" and received is not None:
        _end(
            status,
            "interrupted",
            f"stopped at once by {exit_markers.signal_name(received)} after step {step}",
        )
        is_requeued = True
    elif status.state == "running":
        # Rank 0 was killed from outside, or crashed.
        who = exit_markers.describe_missing(missing) if missing else f"the processes died (code {code})"
        _end(status, "failed", f"{who} after step {step}{_flight_recorder(folder, began)}")
    elif status.state == "failed" and missing and SILENT not in attempt.reason:
        # The other ranks only saw their connection break. A rank that hung was killed because of that.
        who, dumps = exit_markers.describe_missing(missing), _flight_recorder(folder, began)
        attempt.reason = f"{who}; then {attempt.reason}{dumps}"
    else:
        may_edit = False
    if may_edit:
        # A full or read-only disk changes nothing about how the run ended.
        with suppress(OSError):
            atomic.write_json(folder / readers.STATUS, status.facts())
            if is_requeued:
                atomic.write_text(folder / REQUEUE, f"{step}\n")
    return RunOutcome(folder, status.state, EXIT_CODES.get(status.state, 3), attempt.reason)


def _flight_recorder(folder: Path, began: float) -> str:
    """Return where NCCL wrote its last collectives in this attempt, as the end of a sentence; "" if nowhere."""
    dumps = [path for path in (folder / FLIGHT_RECORDER).glob("rank_*") if path.stat().st_mtime >= began]
    if not dumps:
        return ""
    return (
        f"; NCCL timed out and left the last collectives of {len(dumps)} process(es) in {FLIGHT_RECORDER}/ "
        f"(torchfrtrace {FLIGHT_RECORDER})"
    )


def _keep_stacks(folder: Path, missing: Mapping[int, str]) -> None:
    for rank, stacks in missing.items():
        if stacks:
            (folder / CRASHES).mkdir(exist_ok=True)
            atomic.write_text(folder / CRASHES / f"rank_{rank}.txt", stacks)


def _is_since(time_text: str | None, began: float) -> bool:
    """Return True if the time ``time_text``, in whole seconds, is not before ``began``."""
    try:
        return datetime.fromisoformat(time_text or "").timestamp() >= int(began)
    except ValueError:
        return began == 0.0


def _end(status: Status, state: str, reason: str) -> None:
    status.state, status.updated = state, now()
    attempt = status.attempts[-1]
    attempt.state, attempt.ended, attempt.reason = state, now(), reason


def main(argv: Sequence[str]) -> int:
    """Print state and reason in one line, and return the exit code."""
    folder, code = Path(argv[0]), int(argv[1])
    options = dict.fromkeys(("began", ""), "")
    options |= {name: value for name, _, value in (word.rpartition("=") for word in argv[2:])}
    received = signal.Signals[options[""]] if options[""] else None
    markers = os.environ.get(exit_markers.FOLDER_VARIABLE)
    missing = exit_markers.missing_ranks(Path(markers)) if markers else {}
    outcome = finalize(folder, code, missing, received, float(options["began"] or 0))
    print(" ".join(f"{outcome.state}: {outcome.reason}".split()))
    return outcome.exit_code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
