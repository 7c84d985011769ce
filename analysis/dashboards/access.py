"""Whether W&B can be asked at all. Its own client may wait for minutes, also at the interpreter's exit."""

from __future__ import annotations

import os
import urllib.error
import urllib.request

from harness.record.wandb import resolve_mode

TIMEOUT_S = 5
ANSWER_TIMEOUT_S = 60
"""Longest wait for one answer of a server that was there before."""


def obstacle() -> str | None:
    """Why W&B can't be used now, in words; None if a server answers and this user is logged in to it."""
    mode = resolve_mode("auto")
    if mode != "online":
        return (
            "WANDB_MODE says so"
            if os.environ.get("WANDB_MODE")
            else "not logged in (wandb login, or WANDB_API_KEY)"
        )
    quiet()
    import wandb

    # A few seconds of retries instead of minutes: what is saved here can be saved again.
    wandb.setup(
        settings=wandb.Settings(
            x_graphql_retry_max=3, x_graphql_retry_wait_max_seconds=5, x_graphql_timeout_seconds=20
        )
    )
    base = str(wandb.setup().settings.base_url)
    try:
        urllib.request.urlopen(base, timeout=TIMEOUT_S).close()
    except urllib.error.HTTPError:
        return None  # it answered
    except (OSError, ValueError) as error:
        return f"{base} does not answer ({getattr(error, 'reason', error)})"
    return None


def quiet() -> None:
    """W&B's own lines on the terminal, and its reports of errors to its maker, off unless asked for."""
    os.environ.setdefault("WANDB_SILENT", "true")
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
