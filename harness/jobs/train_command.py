"""``optbench train [key=value …] [--json]``: one run."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from harness import command_line
from harness.jobs import forks

if TYPE_CHECKING:
    from harness.config.schema import RunConfig


def main(argv: Sequence[str]) -> int:
    """Train one run in processes of its own and return the exit code of its end.

    The code is 0 if the run finished, 3 if it failed or diverged, and 75 if it was interrupted.

    Raises:
        InputError: bad input; nothing was started.
    """
    # An unknown option stays among the overrides: what it was meant to be is found there.
    arguments = command_line.parse("train", argv, keeps_unknown=True)
    overrides, as_json = arguments.rest, arguments.options.json
    # Before our own imports: what takes longest should begin first.
    forks.warm_up()
    from harness.jobs import launch
    from harness.output import json_document
    from harness.preparation import prepare
    from harness.record import readers
    from harness.worker import closing_lines

    prepared = prepare(overrides, say=lambda text: print(text, file=sys.stderr, flush=True))
    outcome = launch.start(prepared, output=sys.stderr if as_json else None)
    resume = resume_command(overrides, prepared.config)
    if as_json:
        facts, _ = readers.json_object(outcome.folder / readers.SUMMARY)
        is_resumable = outcome.state == "interrupted"
        print(
            json_document(
                folder=str(outcome.folder),
                state=outcome.state,
                reason=outcome.reason,
                resume=resume if is_resumable else None,
                summary=facts,
            )
        )
    else:
        print(*closing_lines(outcome.folder, outcome.state, outcome.reason, resume), sep="\n")
    return outcome.exit_code


def resume_command(words: Sequence[str], config: RunConfig) -> str:
    """Return the command that resumes an interrupted run.

    Args:
        words: arguments of `optbench train`, as typed.
        config: of the run.
    """
    keys = [word.lstrip("+").partition("=")[0] for word in words]
    kept = [word for word, key in zip(words, keys) if key not in ("overwrite", "resume")]
    # A configuration file may set them, and then the run would begin anew.
    kept += ["overwrite=false"] if config.overwrite and "overwrite" not in keys else []
    kept += ["resume=true"] if not config.resume and "resume" not in keys else []
    return shlex.join(["optbench", "train", *kept])
