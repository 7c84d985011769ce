"""The outputs of the GPU check: gpu_check.json, gpu_check.md, and the tables of docs/gpu.md."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu_check.record import Document, StageRecord
from benchmarks.gpu_check.runner import Session, Stage
from harness.errors import InputError
from harness.files import atomic

BEGIN, END = "<!-- tables: written by make gpu-check -->", "<!-- end of tables -->"
JSON_NAME, PAGE_NAME = "gpu_check.json", "gpu_check.md"


def collect(stages: Sequence[Stage], session: Session) -> Document:
    """Return the document of all stages; one without a record, or with one of another session, has not run."""
    records = []
    for stage in stages:
        record = StageRecord.load(session.path(stage))
        if record is None or record.key != session.key:
            reason = "has no result of these sources on this device"
            record = StageRecord(name=stage.name, title=stage.title, reason=reason)
        records.append(record)
    counts = Counter(check.status for record in records for check in record.checks)
    return Document(
        device=session.device_name,
        mode="quick" if session.quick else "full",
        environment=_environment(records),
        passed=counts["passed"],
        failed=counts["failed"],
        not_run=counts["not run"] + sum(record.status == "not run" for record in records),
        seconds=sum(record.seconds for record in records),
        stages=records,
    )


def write(document: Document, out: Path, docs: Path | None = None) -> None:
    """Write the outputs, and read them back: a promised page that is missing is an error.

    Args:
        document: of `collect`.
        out: folder of the outputs.
        docs: page that takes the tables between its two markers; None: no page.

    Raises:
        InputError: the page has no markers.
        OSError: an output could not be written.
    """
    page = render(document)
    atomic.write_text(out / JSON_NAME, document.model_dump_json(indent=2) + "\n")
    atomic.write_text(out / PAGE_NAME, page)
    if docs is not None:
        atomic.write_text(docs, _between_markers(docs, page))
    for path in (out / JSON_NAME, out / PAGE_NAME, *([docs] if docs else [])):
        if not path.is_file() or path.stat().st_size == 0:
            raise OSError(f"{path} was promised and is missing")


def render(document: Document) -> str:
    """Return the Markdown page."""
    lines = [
        f"{document.passed} passed, {document.failed} failed, {document.not_run} not run, "
        f"{document.seconds:.0f} s, on {document.environment.get('device', document.device)}"
        f"{' (quick mode: tiny sizes, no figure is a measurement)' if document.mode == 'quick' else ''}.",
    ]
    for record in document.stages:
        lines += ["", f"## {record.title}", "", _state(record)]
        if record.checks:
            lines += ["", "| check | what it proves | result | figures |", "|---|---|---|---|"]
            for check in record.checks:
                result = check.status + (f": {check.reason}" if check.reason else "")
                lines.append(
                    f"| {_cell(check.name)} | {_cell(check.proves)} | {_cell(result)} | {_figures(check.figures)} |"
                )
        for table in record.tables:
            lines += ["", f"{table.title}:", "", _row(table.columns), "|" + "---|" * len(table.columns)]
            lines += [_row(row) for row in table.rows]
    return "\n".join(lines) + "\n"


def _state(record: StageRecord) -> str:
    state = f"`{record.name}`: {record.status}"
    if record.status in ("done", "timed out", "crashed"):
        state += f", {record.seconds:.0f} of at most {record.limit_s:.0f} s"
    return state + (f" ({_cell(record.reason)})" if record.reason else "")


def _figures(figures: dict[str, Any]) -> str:
    return _cell(", ".join(f"{name} {_number(value)}" for name, value in figures.items()))


def _row(values: Sequence[Any]) -> str:
    return "| " + " | ".join(_cell(_number(value)) for value in values) + " |"


def _number(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def _environment(records: Sequence[StageRecord]) -> dict[str, Any]:
    """Return the figures of the environment stage's first check."""
    first = next((record for record in records if record.name == "environment" and record.checks), None)
    return dict(first.checks[0].figures) if first else {}


def _between_markers(docs: Path, page: str) -> str:
    text = docs.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise InputError("--docs", docs, f"has no place for the tables between {BEGIN!r} and {END!r}")
    head, tail = text[: text.index(BEGIN)], text[text.index(END) :]
    # One level deeper: the page has a title of its own.
    deeper = page.replace("\n## ", "\n### ")
    return f"{head}{BEGIN}\n\n{deeper}\n{tail}"
