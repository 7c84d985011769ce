"""Show an audit to people: Markdown, an HTML page, and a line for a README. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from harness.files import atomic
from harness.verify.audit import tables
from harness.verify.audit.document import CLASSES, VERDICTS, TargetReport
from harness.verify.audit.tables import Table
from harness.visible import markdown, markdown_row, visible

_TEMPLATES = Path(__file__).parent / "templates"


def write(reports: Sequence[TargetReport], folder: Path) -> list[Path]:
    """Write audit.html, audit.md and badge.md, one after the other.

    Args:
        reports: of all targets, in the order in which they are shown.
        folder: exists.

    Returns:
        The paths of the files.

    Raises:
        OSError: a file cannot be written.
    """
    contents = {"audit.html": html(reports), "audit.md": text(reports), "badge.md": badges(reports)}
    paths = [folder / name for name in contents]
    for path, content in zip(paths, contents.values(), strict=True):
        atomic.write_text(path, content)
    return paths


def badges(reports: Sequence[TargetReport], link: str = "audit.md") -> str:
    """Return the lines of all targets, one each, for their authors' READMEs."""
    return "".join(f"{tables.badge(report, link)}\n\n" for report in reports).rstrip("\n") + "\n"


def text(reports: Sequence[TargetReport]) -> str:
    """Return the Markdown page: summary, then findings and tables of each target."""
    parts = ["# Audit", _headline(reports), "## Summary", *_summary(reports)]
    for report in reports:
        parts += [f"## {markdown(report.target)}", *_details(report)]
    parts += ["## Terms", legend()]
    return "\n\n".join(parts) + "\n"


def _headline(reports: Sequence[TargetReport]) -> str:
    found = tables.counts(reports)
    words = ", ".join(f"{count} {word}" for word, count in found.items() if count)
    return f"**{words or 'nothing audited'}** (optbench {metadata.version('optbench')})."


def _summary(reports: Sequence[TargetReport]) -> list[str]:
    parts = []
    for table in (tables.summary(reports), tables.refused(reports)):
        if table.rows:
            parts.append(table_text(table))
    return parts


def _details(report: TargetReport) -> list[str]:
    if report.error:
        return [f"Not audited: {markdown(report.error)}."]
    parts = []
    about = [
        report.version,
        f"class {report.update_class}" if report.update_class else "",
        report.explanation,
    ]
    line = "; ".join(filter(None, [*about, *report.notes]))
    if line:
        parts.append(f"{markdown(line)}.")
    found = tables.findings(report)
    if found:
        parts.append("\n".join(f"- {markdown(finding)}" for finding in found))
    for table in (tables.cells_table(report), tables.checks_table(report)):
        if table.rows:
            parts += [f"### {table.title}", table_text(table)]
    for check in report.checks:
        if check.passed is False and check.reproduction:
            parts += [
                f"Reproduction of {markdown(check.name)}:",
                f"```python\n{check.reproduction.strip()}\n```",
            ]
    return parts


def table_text(table: Table) -> str:
    """Return a table in Markdown."""
    rows = [markdown_row(table.head), markdown_row(["---"] * len(table.head))]
    return "\n".join([*rows, *map(markdown_row, table.rows)])


def legend() -> str:
    """Return the meaning of verdicts and classes, as a list in Markdown."""
    terms = {**VERDICTS, **CLASSES}
    return "\n".join(f"- **{name}**: {meaning}." for name, meaning in terms.items())


def html(reports: Sequence[TargetReport]) -> str:
    """Return the HTML page: one file, no script, nothing loaded from elsewhere."""
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters["visible"] = visible
    # A function of the template: words that are verdicts get the colour of their verdict.
    environment.globals["kind"] = _kind
    return environment.get_template("audit.html.j2").render(**_context(reports))


def _context(reports: Sequence[TargetReport]) -> dict[str, Any]:
    return {
        "version": metadata.version("optbench"),
        "counts": tables.counts(reports),
        "summary": tables.summary(reports),
        "refused": tables.refused(reports),
        "targets": [
            {
                "report": report,
                "findings": tables.findings(report),
                "tables": [
                    table for table in (tables.cells_table(report), tables.checks_table(report)) if table.rows
                ],
            }
            for report in reports
            if not report.error
        ],
        "terms": {**VERDICTS, **CLASSES},
    }


def _kind(text: str) -> str:
    """Return the CSS class of a cell's text."""
    word = text.partition(" ")[0].lower()
    return {"safe": "good", "passed": "good", "wrong": "bad", "failed": "bad", "crashes": "bad"}.get(word, "")
