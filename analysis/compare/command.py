"""The commands ``optbench compare`` and ``optbench report``: words in, exit code and files out.

Words are checked before pandas, scipy and plotly are imported: a slip of the pen is answered at once.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from analysis.compare import arguments

FAILED = 3

if TYPE_CHECKING:
    from analysis.compare.document import Document
    from analysis.compare.report import Written


def report(argv: Sequence[str]) -> int:
    """``optbench report DIR [--out DIR] [--figures png] [--wandb] [--json]``: compare the runs below DIR; 0.

    Without runs it says so.

    ``ENTITY/PROJECT[/GROUP] --export DIR`` reads them from W&B into DIR first.

    Raises:
        InputError: no such folder or W&B project, or words that are not understood.
    """
    asked = arguments.report(argv)
    if asked.export is not None:
        from analysis.dashboards.export import export

        folders, remarks = export(asked.export, asked.folder)
        for line in (*remarks, f"{len(folders)} runs read from W&B into {asked.folder}"):
            print(line, file=sys.stderr)
    from analysis.compare import conclusion

    def publish(found: Document, written: Written) -> Written:
        from analysis.dashboards import publishing

        return publishing.publish(found, written, asked.project)

    further = publish if asked.wandb else None
    conclusion.write(asked.folder, asked.out, as_json=asked.as_json, further=further, figures=asked.figures)
    return 0


def train(plan: arguments.Plan) -> tuple[int, Path]:
    """Train the runs of a comparison that are not finished; returns the exit code and the folder of the group.

    Raises:
        InputError: bad input of any arm; nothing was started.
    """
    from analysis.compare import training

    with training.Trainer(as_json=plan.as_json, verbosity=plan.verbosity) as trainer:
        runs = training.prepared(plan, trainer.say)
        folder = runs[0].folder.parent
        session = training.Session(runs, trainer, group=plan.group)
        with training.holding(folder):
            code = session.train()
    return code, folder


def compare(argv: Sequence[str]) -> int:
    """``optbench compare OPTIMIZER … [seeds=3] [key=value …] [--json]``: train each under the same
    everything.

    The optimizers take turns within a seed, so that a drift of the machine meets all of them alike. Runs of
    the group that are already finished with the same settings are not repeated.

    Returns:
        0 all runs finished · 3 a run failed or diverged (the others were made) · 75 interrupted (call again
        to go on).

    Raises:
        InputError: bad input of any arm; nothing was started.
    """
    plan = arguments.plan(argv)
    code, root = train(plan)
    if not root.is_dir():
        print("no run left a folder: there is nothing to report", file=sys.stderr)
        return code or FAILED
    from analysis.compare import conclusion

    conclusion.leave_origin(root, plan)
    conclusion.write(root, root, as_json=plan.as_json)
    return code
