"""``optbench train [key=value …] [--json]``: one run."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

from harness.jobs import ending, launch
from harness.preparation import prepare
from harness.record import readers
from harness.record.schema import SCHEMA_VERSION


def main(argv: Sequence[str]) -> int:
    """Train one run in processes of its own; the exit code says how it ended.

    0 finished, 3 failed or diverged, 75 interrupted.

    Raises:
        InputError: bad input; nothing was started.
    """
    as_json = "--json" in argv
    overrides = [word for word in argv if word != "--json"]
    prepared = prepare(overrides, say=lambda text: print(text, file=sys.stderr, flush=True))
    outcome = launch.start(prepared, output=sys.stderr if as_json else None)
    resume = ending.resume_command(overrides, prepared.config)
    if as_json:
        facts, _ = readers.json_object(outcome.folder / readers.SUMMARY)
        document = {
            "schema_version": SCHEMA_VERSION,
            "folder": str(outcome.folder),
            "state": outcome.state,
            "reason": outcome.reason,
            "resume": resume if outcome.state == "interrupted" else None,
            "summary": facts,
        }
        print(json.dumps(document, indent=2))
    else:
        print(*ending.lines(outcome.folder, outcome.state, outcome.reason, resume), sep="\n")
    return outcome.exit_code
