"""Print the run folder of some overrides, for a batch script that was submitted by hand, and prepare its data.

    python -m harness.jobs.folder key=value …

Torch-free.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from harness.config.schema import RunConfig
from harness.errors import InputError
from harness.preparation import prepare


def folder_of(words: Sequence[str]) -> Path:
    """Return the absolute path of the run folder, and prepare the run's data.

    Raises:
        InputError: bad input, or words that would make every attempt of the job begin anew.
    """
    # The number of processes is not known here and changes no folder.
    words = [word for word in words if not word.startswith(("world_size=", "micro_batch_size=", "engine"))]
    run = prepare([*words, "world_size=1"], say=_say, writes_folder=False)
    check_attempts(run.config)
    return run.folder.absolute()


def check_attempts(config: RunConfig, *, may_overwrite: bool = False) -> None:
    """Refuse ``resume=false`` and ``overwrite=true``, which every attempt of a job would repeat.

    Args:
        config: of the run.
        may_overwrite: accept ``overwrite=true``, because the command that submits archives the old folder once.

    Raises:
        InputError: the configuration has one of them.
    """
    reason = "would begin anew whenever the job is queued again"
    if not config.resume:
        raise InputError(
            "resume", "false", reason, fix="overwrite=true with optbench submit (archives the old run once)"
        )
    if config.overwrite and not may_overwrite:
        raise InputError(
            "overwrite", "true", reason, fix="optbench submit …, which archives the old run once"
        )


def main(argv: Sequence[str]) -> int:
    """Print the run folder; bad input is one line on standard error and exit code 2."""
    try:
        print(folder_of(argv))
    except InputError as error:
        _say(str(error))
        return 2
    return 0


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
