"""What runs left for W&B in their folders, sent there by `wandb sync`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

TIMEOUT_S = 300


def waiting(run: Path) -> list[Path]:
    """W&B's offline folders of a run that were not sent yet; empty for a run that W&B has."""
    return [
        folder
        for folder in sorted((run / "wandb").glob("offline-run-*"))
        if not list(folder.glob("*.synced"))
    ]


def sync(run: Path) -> str | None:
    """Send what waits in a run folder; returns why it could not be sent, in words, else None."""
    folders = waiting(run)
    if not folders:
        return None
    command = [sys.executable, "-m", "wandb", "sync", "--yes", *map(str, folders)]
    # W&B's command would send its own path on this machine as the run's program, and report on itself to its maker.
    quiet = {"WANDB_PROGRAM": "optbench train", "WANDB_ERROR_REPORTING": "false", "WANDB_SILENT": "false"}
    try:
        done = subprocess.run(
            command,
            # Without the service of this process, which may be gone.
            env={**{k: v for k, v in os.environ.items() if k != "WANDB_SERVICE"}, **quiet},
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return type(error).__name__
    # Its exit code is 0 also where it could read nothing; what was sent has its mark.
    if done.returncode == 0 and not waiting(run):
        return None
    lines = [line.strip() for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    wrong = [line for line in lines if "ERROR" in line] or lines[-1:] or ["wandb sync failed"]
    return wrong[-1][:200]
