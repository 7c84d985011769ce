"""`optbench compare OPTIMIZER …`: train several optimizers under one protocol, then write the report."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from analysis.compare import arguments
from harness.errors import ExitCode


def main(argv: Sequence[str]) -> int:
    """Run ``optbench compare OPTIMIZER … [seeds=3] [key=value …] [--json]``.

    The optimizers take turns within a seed, so that a drift of the machine affects all of them alike. Runs of
    the group that finished with the same settings are not repeated.

    Returns:
        0: all runs finished. 3: a run failed or diverged (the others were made). 75: interrupted (call again
        to continue).

    Raises:
        InputError: bad input of any arm; nothing was started.
    """
    # Arguments are checked before the imports that take long.
    plan = arguments.plan(argv)
    from analysis.compare import sessions

    code, folder = sessions.train(plan)
    if not folder.is_dir():
        print("no run left a folder: there is nothing to report", file=sys.stderr)
        return code or ExitCode.RUN_FAILED
    from analysis.report import report

    sessions.write_provenance(folder, plan)
    report.finish(folder, folder, as_json=plan.as_json)
    return code
