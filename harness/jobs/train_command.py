"""``optbench train [key=value …] [--json]``: one run."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

from harness.jobs import launch
from harness.record.schema import SCHEMA_VERSION


def main(argv: Sequence[str]) -> int:
    """Train one run in processes of its own; the exit code says how it ended.

    0 finished, 3 failed or diverged, 75 interrupted.

    Raises:
        InputError: bad input; nothing was started.
    """
    as_json = "--json" in argv
    overrides = [word for word in argv if word != "--json"]
    outcome = launch.run(
        overrides,
        say=lambda text: print(text, file=sys.stderr, flush=True),
        output=sys.stderr if as_json else None,
    )
    try:
        facts = json.loads((outcome.folder / "summary.json").read_text())
    except OSError:
        facts = None
    if as_json:
        document = {"schema_version": SCHEMA_VERSION, "folder": str(outcome.folder), "state": outcome.state}
        print(json.dumps({**document, "reason": outcome.reason, "summary": facts}, indent=2))
    else:
        loss = facts["val/loss"] if facts else None
        print(
            f"{outcome.state}: {outcome.reason}" + ("" if loss is None else f"; validation loss {loss:.4f}")
        )
        print(outcome.folder)
    return outcome.exit_code
