"""Reach W&B: check that it answers, and send the runs that are waiting in their folders.

W&B's own client may wait for minutes, also when the interpreter exits; the limits here are seconds.
"""

from __future__ import annotations

import os
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

from harness.record.wandb import resolve_mode

CONNECT_TIMEOUT_S = 5
ANSWER_TIMEOUT_S = 60
"""Longest wait for one answer of a server that answered before."""
SYNC_TIMEOUT_S = 300


def find_obstacle() -> str | None:
    """Return why W&B cannot be used now; None if a server answers and this user is logged in to it."""
    if resolve_mode("auto") != "online":
        has_mode = os.environ.get("WANDB_MODE")
        return "WANDB_MODE is not online" if has_mode else "not logged in (wandb login, or WANDB_API_KEY)"
    # Without these, W&B prints lines of its own and reports errors to its maker.
    os.environ.setdefault("WANDB_SILENT", "true")
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    import wandb

    # A few seconds of retries instead of minutes: whatever is saved here can be saved again.
    wandb.setup(
        settings=wandb.Settings(
            x_graphql_retry_max=3, x_graphql_retry_wait_max_seconds=5, x_graphql_timeout_seconds=20
        )
    )
    base = str(wandb.setup().settings.base_url)
    try:
        urllib.request.urlopen(base, timeout=CONNECT_TIMEOUT_S).close()
    except urllib.error.HTTPError:
        return None  # An error status is an answer, too.
    except (OSError, ValueError) as error:
        return f"{base} does not answer ({getattr(error, 'reason', error)})"
    return None


def unsent_folders(run: Path) -> list[Path]:
    """Return W&B's offline folders of a run that were not sent yet."""
    folders = sorted((run / "wandb").glob("offline-run-*"))
    return [folder for folder in folders if not list(folder.glob("*.synced"))]


def sync(run: Path) -> str | None:
    """Send the offline folders of a run with ``wandb sync``; return why that failed, or None."""
    folders = unsent_folders(run)
    if not folders:
        return None
    command = [sys.executable, "-m", "wandb", "sync", "--yes", *map(str, folders)]
    # W&B's command would send its own path on this machine as the run's program.
    quiet = {"WANDB_PROGRAM": "optbench train", "WANDB_ERROR_REPORTING": "false", "WANDB_SILENT": "false"}
    # The service of this process may have ended already.
    inherited = {key: value for key, value in os.environ.items() if key != "WANDB_SERVICE"}
    try:
        process = subprocess.run(
            command,
            env={**inherited, **quiet},
            capture_output=True,
            text=True,
            timeout=SYNC_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return type(error).__name__
    # The exit code is 0 also if nothing could be read; a folder that was sent has a mark.
    if process.returncode == 0 and not unsent_folders(run):
        return None
    lines = [line.strip() for line in (process.stdout + process.stderr).splitlines() if line.strip()]
    errors = [line for line in lines if "ERROR" in line] or lines[-1:] or ["wandb sync failed"]
    return errors[-1][:200]
