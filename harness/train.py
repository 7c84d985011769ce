"""Entry point of a training process: ``accelerate launch -m harness.train key=value …``, or without a launcher.

From Python the module can be called: ``from harness import train; train(optimizer="sumo", steps=100)`` starts processes
and returns a data frame (docs/python.md).

Read in this order: `harness.preparation` (what can be checked before torch is imported), `harness.run` (the
run's parts and its record), `harness.loop` (training).
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from harness.config.errors import InputError
from harness.jobs import ending
from harness.preparation import Prepared, prepare
from harness.process import exit_markers, parent
from harness.process.stop import outlive_the_terminal
from harness.record import readers

EXIT_CODES = {"finished": 0, "interrupted": 0, "diverged": 3, "failed": 3}
"""Of a training process, by the state that the run ended in. An interrupted process exits with 0, because a
launcher takes everything else for a crash; `optbench train` turns the state into its own exit code."""

ERROR_FILE = "OPTBENCH_ERROR_FILE"
"""Environment variable: where rank 0 leaves an `InputError` for the command that started it."""

GRACE_S = 10


def main(argv: Sequence[str] | None = None) -> int:
    """Run one training process; returns its exit code. Bad input is one line on rank 0 and code 2."""
    words = list(sys.argv[1:] if argv is None else argv)
    parent.watch()
    first = os.environ.get("RANK", "0") == "0"

    def say(text: str) -> None:
        if first:
            print(text, file=sys.stderr, flush=True)

    prepared = None
    try:
        with exit_markers.marked():
            prepared = prepare(words, say=say, worker=True, writes_folder=first)
            from harness.run import execute  # imports torch

            state = execute(prepared)
    except InputError as error:
        if not first:
            # Rank 0 found the same and says it. A process that ends before it makes the launcher kill rank 0
            # first; one that is still here afterwards found something of its own.
            time.sleep(GRACE_S)
        print(error, file=sys.stderr, flush=True)
        if first and ERROR_FILE in os.environ:
            with suppress(OSError):
                Path(os.environ[ERROR_FILE]).write_text(json.dumps(error.fields()))
        return 2
    except BaseException:
        if first and prepared is not None:
            _say_end(prepared)
        raise
    if first:
        _say_end(prepared)
    return EXIT_CODES[state]


def _say_end(prepared: Prepared) -> None:
    """Print how the run ended and where it is, unless `optbench` waits for this process and says so itself."""
    if parent.VARIABLE in os.environ:
        return
    status, _ = readers.status(prepared.folder)
    if status is None or not status.attempts:
        return
    resume = "run the same command again"
    reason = status.attempts[-1].reason
    print(*ending.lines(prepared.folder, status.state, reason, resume), sep="\n", flush=True)


class _CallableModule(ModuleType):
    """Lets ``from harness import train`` give the function of the Python API: this module has its name."""

    def __call__(self, *overrides: str, **keys: Any) -> Any:
        """Train one run; see `analysis.api.train`."""
        return import_module("analysis.api").train(*overrides, **keys)


if __name__ in sys.modules and __name__ != "__main__":
    sys.modules[__name__].__class__ = _CallableModule

if __name__ == "__main__":
    # Until the run takes it over, Ctrl-C ends this process without a traceback, as SIGTERM does.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    outlive_the_terminal()
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # All is written and the process group is left. The interpreter's own end runs the destructors of torch's native
    # threads, which abort on a busy machine; a launcher takes that for a crash and kills the other processes.
    os._exit(code)
