"""`optbench audit TARGET …`: is any torch optimizer right on each engine?"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from harness import command_line
from harness.console import for_tables
from harness.errors import ExitCode, InputError
from harness.files import atomic
from harness.output import json_document
from harness.process import termination
from harness.verify.audit import cells, pages, session, table, targets
from harness.verify.audit.controls import CONTROLS
from harness.verify.audit.document import TargetReport
from harness.verify.audit.session import Session
from harness.verify.audit.targets import Target, TargetError
from harness.verify.pool import RankLost

CI_S = 180.0
"""Time limit of ``--ci``, s; what begins at most `CI_CELL_S` before it is over still runs."""
CI_CELL_S = 20.0


def main(argv: Sequence[str]) -> int:
    """Audit targets; 0 if something was audited, everything ran, nothing is wrong and every control was detected, 1 if
    not, 3 if the processes do not start.

    Raises:
        InputError: a target that cannot be audited, an unknown engine, a folder that cannot be written.
    """
    arguments = command_line.parse("audit", argv)
    options = arguments.options
    selected = cells.select(_split(options.engine))
    packages = _split(options.all)
    typed = targets.parse(arguments.rest, options.kwargs) if arguments.rest or not packages else []
    out = Path(options.out) if options.out else None
    if out:
        atomic.check_folder("--out", out, fix="--out runs/audit")
    limit_s = _seconds(options.time_limit) or (CI_CELL_S if options.ci else session.CELL_S)
    session.preload([*packages, *(target.name for target in typed)])
    console = for_tables(stderr=True)
    deadline = time.monotonic() + CI_S - CI_CELL_S if options.ci else None
    reports: list[TargetReport] = []
    ready: list[Target] = []
    with termination.terminable(), tempfile.TemporaryDirectory(prefix="optbench-audit-") as scratch:
        try:
            with Session(Path(scratch), limit_s, deadline) as running:
                ready, skipped = _probed(running, typed, packages)
                for number, target in enumerate(ready, 1):
                    report = running.audit(target, selected)
                    reports.append(report)
                    console.print(table.line(report, number, len(ready)), soft_wrap=True)
                if options.include_controls:
                    reports += running.controls(CONTROLS)
        except RankLost as error:
            message = str(error).splitlines()[0]
            if options.json:
                print(json_document(error={"key": "audit", "message": message}))
            print(error, file=sys.stderr, flush=True)
            return ExitCode.RUN_FAILED
    passed = bool(ready) and all(report.passed for report in reports)
    document = _document(passed, [*reports, *skipped])
    files = _write(out, document, [*reports, *skipped])
    if options.ci:
        _summarize(reports)
    if not ready:
        print(
            f"nothing was audited: {', '.join(packages)} has no optimizer that can be",
            file=sys.stderr,
            flush=True,
        )
    for report in reports:
        if report.not_run:
            print(table.not_run(report), file=sys.stderr, flush=True)
    if options.json:
        print(document)
    else:
        table.show([*reports, *skipped], for_tables())
        for file in files:
            print(file)
    return 0 if passed else ExitCode.CHECK_FAILED


def _probed(
    running: Session, typed: Sequence[Target], packages: Sequence[str]
) -> tuple[list[Target], list[TargetReport]]:
    """Return the targets that can be audited, and reports about those of packages that cannot.

    Raises:
        InputError: a target that was typed cannot be audited.
    """
    ready: list[Target] = []
    skipped: list[TargetReport] = []
    for target in typed:
        try:
            ready.append(running.probe(target))
        except TargetError as error:
            raise error.as_input_error(target.label) from None
    for target in [member for package in packages for member in running.members(package)]:
        try:
            # After the deadline it is only named, as not run.
            ready.append(target if running.is_late else running.probe(target))
        except TargetError as error:
            version = targets.version(target.name)
            skipped.append(TargetReport(target.label, error=error.reason, version=version))
    return ready, skipped


def _document(passed: bool, reports: Sequence[TargetReport]) -> str:
    return json_document(passed=passed, targets=[report.as_dict() for report in reports])


def _write(out: Path | None, document: str, reports: Sequence[TargetReport]) -> list[Path]:
    if out is None:
        return []
    out.mkdir(parents=True, exist_ok=True)
    file = out / "audit.json"
    atomic.write_text(file, document + "\n")
    return [file, *pages.write(reports, out)]


def _summarize(reports: Sequence[TargetReport]) -> None:
    """Append a Markdown table to the job summary of GitHub Actions, where there is one."""
    path = os.environ.get("GITHUB_STEP_SUMMARY")
    if path:
        with open(path, "a", encoding="utf-8") as file:
            file.write(table.markdown(reports))


def _split(values: Sequence[str]) -> list[str]:
    return [part for value in values for part in value.split(",") if part]


def _seconds(text: str | None) -> float | None:
    if text is None:
        return None
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < 1e6:
        raise InputError("--time-limit", text, allowed="seconds above 0", fix="--time-limit 60")
    return seconds
