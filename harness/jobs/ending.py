"""The last lines of a run on the terminal: how it ended, where it is, how to go on. Torch-free."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from harness.config.schema import RunConfig
from harness.record import readers


def resume_command(words: Sequence[str], config: RunConfig) -> str:
    """Return the command that goes on with a run that was interrupted.

    Args:
        words: of `optbench train`, as typed.
        config: of the run.
    """
    keys = [word.lstrip("+").partition("=")[0] for word in words]
    kept = [word for word, key in zip(words, keys) if key not in ("overwrite", "resume")]
    # From a file: they would begin anew.
    kept += ["overwrite=false"] if config.overwrite and "overwrite" not in keys else []
    kept += ["resume=true"] if not config.resume and "resume" not in keys else []
    return shlex.join(["optbench", "train", *kept])


def lines(folder: Path, state: str, reason: str, resume: str | None = None) -> list[str]:
    """Return what to print at the end of a run.

    Args:
        folder: of the run.
        state: that it ended in.
        reason: one line.
        resume: a command, or words in its place; shown where the run was interrupted.
    """
    summary, _ = readers.summary(folder)
    # An attempt that died early left the summary of the one before it.
    loss = summary.val_loss if summary is not None and summary.state == state else None
    shown = f"; validation loss {loss:.4f}" if loss is not None else ""
    last = [f"to resume: {resume}"] if state == "interrupted" and resume is not None else []
    return [f"{state}: {reason}{shown}", *last, str(folder)]
