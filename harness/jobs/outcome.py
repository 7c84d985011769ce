"""How the processes of a run ended, for a batch script: status.json is completed, and the exit code is `optbench`'s.

    python -m harness.jobs.outcome FOLDER CODE [SIGNAL] [began=SECONDS]

CODE is the launcher's; SIGNAL is the one that the script was told to stop by; SECONDS the Unix time before the
processes were started, so that what an earlier attempt left is not taken for this one's. Torch-free.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from harness.jobs import launch
from harness.process import exit_markers


def main(argv: Sequence[str]) -> int:
    """Print state and reason in one line; returns the exit code."""
    folder, code = Path(argv[0]), int(argv[1])
    options = dict.fromkeys(("began", ""), "")
    options |= {name: value for name, _, value in (word.rpartition("=") for word in argv[2:])}
    asked = signal.Signals[options[""]] if options[""] else None
    marks = os.environ.get(exit_markers.FOLDER_VARIABLE)
    silent = exit_markers.missing_ranks(Path(marks)) if marks else []
    ended = launch.outcome(folder, code, silent, asked, float(options["began"] or 0))
    print(" ".join(f"{ended.state}: {ended.reason}".split()))
    return ended.exit_code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
