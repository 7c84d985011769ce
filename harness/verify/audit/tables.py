"""Audit results as rows of text, for Markdown and HTML alike. Torch-free."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from harness.verify.audit.document import CellReport, Check, TargetReport, is_good
from harness.visible import markdown

MISSING = "–"
_ORDER = ("wrong", "crashes", "refused", "safe")
"""Verdicts, the one that a reader must know first at the front."""


@dataclass(frozen=True)
class Table:
    """A table with its title.

    Attributes:
        title: may be empty.
        head: names of the columns.
        rows: texts, one per column.
    """

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]


def summary(reports: Sequence[TargetReport]) -> Table:
    """Return one row per target: class, the verdict on each engine, failed checks."""
    audited = [report for report in reports if not report.error]
    engines = engines_of(audited)
    rows = [
        [
            report.target,
            report.update_class or MISSING,
            *(verdict_of(report, engine) for engine in engines),
            failed_checks(report.checks),
        ]
        for report in audited
    ]
    return Table("", ["optimizer", "class", *engines, "failed checks"], rows)


def engines_of(reports: Iterable[TargetReport]) -> list[str]:
    """Return the engines of all cells, in the order in which they ran."""
    return list(dict.fromkeys(cell.engine for report in reports for cell in report.cells if not cell.control))


def verdict_of(report: TargetReport, engine: str) -> str:
    """Return the worst verdict of an engine, with the variants that have it unless all do."""
    cells = [cell for cell in report.cells if cell.engine == engine and not cell.control]
    if not cells:
        return MISSING
    verdict = min((cell.verdict for cell in cells), key=_ORDER.index)
    having = [cell.variant or "plain" for cell in cells if cell.verdict == verdict]
    return verdict if len(having) == len(cells) else f"{verdict} ({', '.join(having)})"


def failed_checks(checks: Sequence[Check]) -> str:
    """Return the names of the checks that failed."""
    return ", ".join(check.name for check in checks if check.passed is False) or MISSING


def refused(reports: Sequence[TargetReport]) -> Table:
    """Return the targets that could not be audited, with the reason."""
    return Table("", ["optimizer", "reason"], [[r.target, r.error] for r in reports if r.error])


def findings(report: TargetReport) -> list[str]:
    """Return what a reader of one target must know: cells that are not safe, and checks that failed."""
    grouped: dict[tuple[str, str], list[str]] = {}
    for cell in report.cells:
        if cell.control or cell.verdict == "safe":
            continue
        grouped.setdefault((cell.verdict, cell.reason), []).append(cell.label)
    lines = [
        f"{verdict} on {', '.join(dict.fromkeys(labels))}{': ' if reason else ''}{reason}"
        for (verdict, reason), labels in grouped.items()
    ]
    lines += [f"{check.name}: {check.detail}" for check in report.checks if check.passed is False]
    if report.not_run:
        lines.append(f"not run, because there was no time: {', '.join(report.not_run)}")
    return lines


def cells_table(report: TargetReport) -> Table:
    """Return one row per cell."""
    head = [
        "engine",
        "processes",
        "verdict",
        "replay error",
        "noise floor",
        "first step",
        "parameter",
        "reason",
    ]
    rows = [
        [
            f"{cell.label} [{cell.control}]" if cell.control else cell.label,
            str(cell.world_size),
            cell.verdict,
            number(cell.replay_error),
            number(cell.noise_floor),
            MISSING if cell.first_step is None else str(cell.first_step),
            cell.parameter or MISSING,
            cell.reason,
        ]
        for cell in report.cells
    ]
    return Table("Engines", head, rows)


def checks_table(report: TargetReport) -> Table:
    """Return one row per check."""
    rows = [[check.name, check_word(check), check.detail] for check in report.checks]
    return Table("Checks in one process", ["check", "result", "measured"], rows)


def check_word(check: Check) -> str:
    """Return the result of a check in a word."""
    return {True: "passed", False: "FAILED", None: "no verdict"}[check.passed]


def number(value: float | None) -> str:
    """Return a figure of two digits."""
    return MISSING if value is None else f"{value:.1e}".replace("e-0", "e-").replace("e+00", "")


def counts(reports: Sequence[TargetReport]) -> Mapping[str, int]:
    """Return how many targets passed, failed, were not audited to the end, and could not be audited."""
    return {
        "passed": sum(report.passed for report in reports),
        "failed": sum(report.failed and not report.error for report in reports),
        "not finished": sum(bool(report.not_run) and not report.failed for report in reports),
        "not audited": sum(bool(report.error) for report in reports),
    }


def badge(report: TargetReport, link: str = "audit.md") -> str:
    """Return one line of Markdown for a README: what is certain, and a link to the evidence.

    Args:
        report: of one target.
        link: address of the page that holds the tables.
    """
    if report.error:
        return f"**{markdown(report.target)}**: not audited ([optbench audit]({link}))"
    by_verdict: dict[str, list[str]] = {}
    for engine in engines_of([report]):
        by_verdict.setdefault(verdict_of(report, engine).partition(" ")[0], []).append(engine)
    parts = [
        f"{verdict} on {', '.join(by_verdict[verdict])}" for verdict in _ORDER[::-1] if verdict in by_verdict
    ]
    judged = [check for check in report.checks if check.passed is not None]
    if judged:
        parts.append(f"{sum(bool(check.passed) for check in judged)} of {len(judged)} checks passed")
    if report.not_run:
        parts.append(f"{len(report.not_run)} not run")
    kind = f" ({report.update_class})" if report.update_class else ""
    version = f", {markdown(report.version)}" if report.version else ""
    return f"**{markdown(report.target)}**{kind}: {markdown('; '.join(parts))} ([optbench audit]({link}){version})"


def bad_cells(report: TargetReport) -> list[CellReport]:
    """Return the cells that make the audit fail."""
    return [cell for cell in report.cells if not is_good(cell)]
