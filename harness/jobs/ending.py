"""The last lines of a run on the terminal: how it ended, where it is, how to go on. Torch-free."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from harness.config.schema import RunConfig


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
