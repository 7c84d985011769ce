"""The end of a command: judge the runs of a folder, write the report, print tables or the JSON document."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from analysis.compare import document, renderings
from analysis.compare.document import ORIGIN, SCHEMA_VERSION, Document
from analysis.report import report
from analysis.report.report import Written
from analysis.runs import reading
from analysis.training.arguments import Plan
from harness.console import cell, for_tables
from harness.files import atomic
from harness.visible import visible

NARROWEST = 110
"""Width of tables where the output is no terminal."""


Further = Callable[[Document, Written], Written]
"""What else is made of a comparison; returns what was written before and what it added."""


def write(
    folder: Path,
    out: Path,
    *,
    as_json: bool,
    further: Further | None = None,
    extra: Mapping[str, object] | None = None,
    figures: bool = False,
) -> None:
    """Compare the runs below ``folder``, write the report into ``out``, and print.

    Args:
        folder: of the runs.
        out: where the report goes.
        as_json: print the JSON document.
        further: makes something else of the comparison.
        extra: more keys of that document.
        figures: write each plot as a PNG, too.

    Raises:
        InputError: no such folder.
    """
    found = document.read(folder)
    written = report.write(found, out, figures=figures)
    _print(found, written if further is None else further(found, written), as_json, extra or {})


def leave_origin(root: Path, plan: Plan) -> None:
    """Write how the group's runs came about; a second command that adds arms is added, not put in the
    first's place.
    """
    before = reading.mapping(root / ORIGIN, [])
    names = [word.partition("=")[2] for arm in plan.arms for word in arm.overrides[:1]]
    lists = {"commands": [plan.command], "optimizers": names}
    merged = {
        key: list(dict.fromkeys([*document.strings(before.get(key)), *new])) for key, new in lists.items()
    }
    atomic.write_json(root / ORIGIN, {"schema_version": SCHEMA_VERSION, **merged})


def _print(found: Document, written: Written, as_json: bool, more: Mapping[str, object]) -> None:
    """The document, or the tables with the report's path as the last line."""
    if as_json:
        for remark in written.remarks:
            print(visible(remark), file=sys.stderr)
        files = [str(path) for path in written.files]
        extra = {"files": files, **({"links": written.links} if written.links else {})}
        print(json.dumps({**document.to_json(found), **more, **extra}, indent=2, allow_nan=False))
        return
    console = for_tables(width=NARROWEST)
    for judged in found.sets:
        console.print()
        renderings.print_table(judged.table, console)
        console.print()
        console.print(cell(judged.verdict.headline, "bold"))
        if judged.verdict.detail:
            console.print(cell(judged.verdict.detail))
        for caution in judged.cautions:
            if caution.grave:
                console.print(cell(f"! {caution.message}", "red"))
        quiet = sum(not caution.grave for caution in judged.cautions)
        if quiet:
            console.print(cell(f"{quiet} more notes are in the report", "dim"))
    if len(found.sets) != 1:
        console.print()
        console.print(cell(found.sentence, "bold"))
    for remark in found.remarks:
        console.print(cell(f"! {remark}", "red"))
    for remark in written.remarks:
        print(visible(remark))
    for what, address in written.links.items():
        print(visible(f"{what}: {address}"))
    print(visible(written.html))
