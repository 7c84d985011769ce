"""What a margin job writes: trajectory.csv, summary.json, table.md, table.csv, report.html; its JSON document."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from analysis.formatting import to_jsonable
from analysis.margin.settings import Settings
from analysis.margin.trajectory import Run
from analysis.pages import job_page
from analysis.pages.figures import Plot
from harness import visible
from harness.files import atomic
from harness.visible import csv_cell, markdown_row

SCHEMA_VERSION = 1
SHOWN_KEYS = ("t", "ln_tau", "gap", "margin")
MANY = 20


@dataclass(frozen=True)
class Finished:
    """A margin job with all that is said about it.

    Attributes:
        runs: one per optimizer and start.
        notes: what a reader must know before believing a number.
        headline, scope: the result in a sentence, and what it rests on.
        table: a row per optimizer; values are numbers or words.
        plots: of the report.
        more: further tables by name, each a list of rows.
    """

    runs: Sequence[Run]
    notes: Sequence[str]
    headline: str
    scope: str
    table: Sequence[Mapping[str, Any]]
    plots: Sequence[Plot]
    more: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)


def document(settings: Settings, done: Finished) -> dict[str, Any]:
    """`{"runs": […], …}` of `--json`; numbers that are not finite are null.

    Of more than 20 runs the trajectories hold powers of ten only.
    """
    thin = len(done.runs) > MANY
    return to_jsonable(
        {
            "mode": settings.mode,
            "runs": [described(run, thin=thin) for run in done.runs],
            "table": list(done.table),
            **done.more,
            "counts": counts(done.runs),
            "sentence": done.headline,
            "notes": list(done.notes),
        }
    )


def described(run: Run, *, thin: bool) -> dict[str, Any]:
    """One run of the document."""
    rows = [row for row in run.rows if row["t"] is None or row["t"] > 0]
    if thin:
        rows = [row for row in rows if _is_power_of_ten(row["t"])]
    return {
        "optimizer": run.optimizer,
        "run": run.run,
        "status": run.status,
        "C_predicted": run.predicted,
        "C_fit": run.rate.constant,
        "rate_class": run.rate.rate_class,
        "rate": asdict(run.rate),
        **run.facts,
        "trajectory": [{key: row.get(key) for key in SHOWN_KEYS} for row in rows],
    }


def write(settings: Settings, done: Finished, folder: Path) -> list[Path]:
    """Write the files, each whole, and return them."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = ({"run": run.run, "optimizer": run.optimizer, **row} for run in done.runs for row in run.rows)
    texts = {
        "trajectory.csv": to_csv(rows),
        "table.csv": to_csv(done.table),
        "table.md": markdown(done),
        **{f"{name}.csv": to_csv(table) for name, table in done.more.items()},
        "summary.json": json.dumps(summary(settings, done), indent=2, allow_nan=False) + "\n",
        "report.html": page(settings, done),
    }
    for name, text in texts.items():
        atomic.write_text(folder / name, text)
    return [folder / name for name in texts]


def summary(settings: Settings, done: Finished) -> dict[str, Any]:
    """summary.json: settings, what was found of each run, and the tables."""
    runs = [described(run, thin=True) for run in done.runs]
    return to_jsonable(
        {
            "schema_version": SCHEMA_VERSION,
            "settings": asdict(settings),
            "code_version": _version(),
            "sentence": done.headline,
            "counts": counts(done.runs),
            "notes": list(done.notes),
            "table": list(done.table),
            **done.more,
            "runs": [{key: value for key, value in run.items() if key != "trajectory"} for run in runs],
        }
    )


def page(settings: Settings, done: Finished) -> str:
    """report.html."""
    tables = [job_page.Table(*cells(done.table))]
    tables += [job_page.Table(*cells(rows), title=name.replace("_", " ")) for name, rows in done.more.items()]
    return job_page.render(
        command="margin",
        kicker="Robustness margin",
        title=settings.mode,
        headline=done.headline,
        scope=done.scope,
        notes=done.notes,
        tables=tables,
        plots=done.plots,
        settings={key: str(value) for key, value in asdict(settings).items()},
    )


def cells(rows: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Heads and cells of the table, for people: columns without any number are left out, quartiles in brackets."""
    columns = [key for key in (rows[0] if rows else {}) if any(_word(row[key]) for row in rows)]
    shown = [key for key in columns if not key.endswith((" q1", " q3"))]
    return shown, [[_word(row[key]) + _quartiles(row, key) for key in shown] for row in rows]


def counts(runs: Sequence[Run]) -> dict[str, dict[str, int]]:
    """optimizer → status → number of runs: those that died are counted, not averaged."""
    found: dict[str, dict[str, int]] = {}
    for run in runs:
        by_status = found.setdefault(run.optimizer, {})
        by_status[run.status] = by_status.get(run.status, 0) + 1
    return found


def markdown(done: Finished) -> str:
    """The tables, what they say, and how many runs ended how."""
    lines = [visible.markdown(done.headline), "", *_markdown_table(done.table)]
    for name, rows in done.more.items():
        lines += ["", visible.markdown(f"{name.replace('_', ' ')}:"), "", *_markdown_table(rows)]
    lines.append("")
    for name, by_status in counts(done.runs).items():
        text = ", ".join(f"{n} {status}" for status, n in by_status.items())
        lines.append(visible.markdown(f"{name}: {text}"))
    return "\n".join(lines) + "\n"


def _markdown_table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    heads, body = cells(rows)
    return [markdown_row(heads), "|" + "---|" * len(heads), *map(markdown_row, body)]


def to_csv(rows: Iterable[Mapping[str, Any]]) -> str:
    """CSV with the columns of all rows, in the order in which they appear; what is not finite is empty."""
    listed = list(rows)
    columns = list(dict.fromkeys(key for row in listed for key in row))
    out = io.StringIO()
    writer = csv.DictWriter(out, columns, lineterminator="\n")
    writer.writeheader()
    for row in listed:
        writer.writerow({key: "" if _is_nothing(value) else csv_cell(value) for key, value in row.items()})
    return out.getvalue()


def _quartiles(row: Mapping[str, Any], key: str) -> str:
    low, high = row.get(f"{key} q1"), row.get(f"{key} q3")
    return f" [{_word(low)}, {_word(high)}]" if low is not None and high is not None else ""


def _word(value: Any) -> str:
    if _is_nothing(value):
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _is_nothing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and not math.isfinite(value))


def _is_power_of_ten(t: float | None) -> bool:
    return t is not None and t > 0 and abs(math.log10(t) - round(math.log10(t))) < 1e-9


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("optbench")
    except PackageNotFoundError:
        return "checkout"
