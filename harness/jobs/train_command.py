"""``optbench train [key=value …] [--json]``: one run."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from harness import command_line
from harness.jobs import ending, launch
from harness.output import json_document
from harness.preparation import prepare
from harness.record import readers
from harness.worker import closing_lines


def main(argv: Sequence[str]) -> int:
    """Train one run in processes of its own; the exit code says how it ended.

    0 finished, 3 failed or diverged, 75 interrupted.

    Raises:
        InputError: bad input; nothing was started.
    """
    # An unknown option stays among the overrides: what it was meant to be is found there.
    arguments = command_line.parse("train", argv, keeps_unknown=True)
    overrides, as_json = arguments.rest, arguments.options.json
    prepared = prepare(overrides, say=lambda text: print(text, file=sys.stderr, flush=True))
    outcome = launch.start(prepared, output=sys.stderr if as_json else None)
    resume = ending.resume_command(overrides, prepared.config)
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
