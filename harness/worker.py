"""One training process: prepare, train, and tell the command that started it what came out."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from harness.config.launcher import visible_devices
from harness.errors import InputError
from harness.preparation import Prepared, prepare
from harness.process import exit_markers, garbage, gpu_environment, parent
from harness.record import readers

EXIT_CODES = {"finished": 0, "interrupted": 0, "diverged": 3, "failed": 3}
"""Exit code by the state that the run ended in.

An interrupted process exits with 0, because a launcher takes everything else for a crash; `optbench train` turns the
state into its own exit code."""

GRACE_S = 10
"""Seconds that a rank with bad input leaves rank 0 to report the same."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one training process; bad input is one line on rank 0 and exit code 2.

    Args:
        argv: ``key=value`` overrides; None: those of the command line.

    Returns:
        The exit code.
    """
    overrides = list(sys.argv[1:] if argv is None else argv)
    parent.watch()
    is_first = os.environ.get("RANK", "0") == "0"

    def say(text: str) -> None:
        if is_first:
            print(text, file=sys.stderr, flush=True)

    prepared = None
    try:
        with exit_markers.marked():
            prepared = prepare(overrides, say=say, worker=True, writes_folder=is_first)
            if visible_devices():
                os.environ.update(gpu_environment.of_process(os.environ, prepared.folder))
            with garbage.kept_while_importing():
                from harness.run import execute  # imports torch
            state = execute(prepared)
    except InputError as error:
        if not is_first:
            # Rank 0 found the same and says it. A process that ends before it makes the launcher kill rank 0
            # first; one that is still here afterwards found something of its own.
            time.sleep(GRACE_S)
        print(error, file=sys.stderr, flush=True)
        if is_first:
            exit_markers.write_error(error.fields())
        return 2
    except BaseException:
        if is_first and prepared is not None:
            _print_end(prepared)
        raise
    if is_first:
        _print_end(prepared)
    return EXIT_CODES[state]


def closing_lines(folder: Path, state: str, reason: str, resume: str | None = None) -> list[str]:
    """Return what to print at the end of a run: how it ended, how to continue, where it is.

    Args:
        folder: of the run.
        state: that it ended in.
        reason: one line.
        resume: a command, or words in its place; shown where the run was interrupted.
    """
    summary, _ = readers.summary(folder)
    # An attempt that died early left the summary of the one before it.
    ended = summary if summary is not None and summary.state == state else None
    shown = "" if ended is None or ended.val_loss is None else f"; validation loss {ended.val_loss:.4f}"
    # The metric of the run is the first one.
    for name, result in [] if ended is None else list(ended.metrics.items())[:1]:
        shown += "" if result.value is None else f", {name} {result.value:.4f}"
    last = [f"to resume: {resume}"] if state == "interrupted" and resume is not None else []
    return [f"{state}: {reason}{shown}", *last, str(folder)]


def _print_end(prepared: Prepared) -> None:
    """Print how the run ended and where it is, unless `optbench` waits for this process and says so itself."""
    if parent.VARIABLE in os.environ:
        return
    status, _ = readers.status(prepared.folder)
    if status is None or not status.attempts:
        return
    reason = status.attempts[-1].reason
    lines = closing_lines(prepared.folder, status.state, reason, "run the same command again")
    print(*lines, sep="\n", flush=True)
