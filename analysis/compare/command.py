"""The commands ``optbench compare`` and ``optbench report``: words in, exit code and files out.

Words are checked before pandas, scipy and plotly are imported: a slip of the pen is answered at once.
"""

from __future__ import annotations

from collections.abc import Sequence

from analysis.compare import arguments


def report(argv: Sequence[str]) -> int:
    """``optbench report DIR [--out DIR] [--json]``: compare the runs below DIR; 0. Without runs the report says so.

    Raises:
        InputError: no such folder, or words that are not understood.
    """
    folder, out, as_json = arguments.report(argv)
    from analysis.compare import conclusion

    conclusion.write(folder, out, as_json=as_json)
    return 0


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
    from analysis.compare import training

    session = training.Session(plan)
    code = session.train()
    if not session.root.is_dir():
        session.say("no run left a folder: there is nothing to report")
        return code or training.FAILED
    from analysis.compare import conclusion

    conclusion.leave_origin(session.root, plan)
    conclusion.write(session.root, session.root, as_json=plan.as_json)
    return code
