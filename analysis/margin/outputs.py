"""Files of a margin job, its JSON document and its mirror in W&B.

The files are trajectory.csv, summary.json, table.md, table.csv and report.html.
"""

from __future__ import annotations

import csv
import io
import json
import math
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from analysis import job_mirror
from analysis.formatting import to_jsonable
from analysis.margin.config import MarginConfig
from analysis.margin.plots import shown_runs
from analysis.margin.trajectory import MarginRun
from analysis.pages import job_page
from analysis.pages.figures import Plot
from analysis.text_tables import TextTable, markdown_lines
from harness import visible
from harness.files import atomic
from harness.visible import csv_cell

SCHEMA_VERSION = 1
UNLOGGED = ("pattern",)
"""Columns of a row that W&B does not get: text."""
OBSERVED = (
    "Observed, not proved. An attack radius is an upper bound of the margin, a certified radius a lower bound; "
    "the margin between them is unknown. With biases, norms or attention a normalized margin is a heuristic."
)
LOW, HIGH = (" q1", " low"), (" q3", " high")
BOUNDS = (*LOW, *HIGH, " sd")
"""Ends of the names of columns that another column shows beside it: quartiles, an interval, a standard deviation."""
SHOWN_KEYS = ("t", "ln_tau", "gap", "margin")
MANY = 20


@dataclass(frozen=True)
class MarginReport:
    """A finished margin job: its runs, tables, plots and sentences.

    Attributes:
        runs: one per optimizer and start.
        notes: what a reader must know before believing a number.
        headline, scope: the result in a sentence, and what it rests on.
        table: a row per optimizer; values are numbers or words.
        plots: of the report.
        more: further tables by name, each a list of rows.
        question: that the headline answers.
    """

    runs: Sequence[MarginRun]
    notes: Sequence[str]
    headline: str
    scope: str
    table: Sequence[Mapping[str, Any]]
    plots: Sequence[Plot]
    more: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    question: str = ""


def document(config: MarginConfig, report: MarginReport) -> dict[str, Any]:
    """Return the document of `--json`, `{"runs": […], …}`; numbers that are not finite are null.

    Of more than 20 runs the trajectories hold powers of ten only.
    """
    thin = len(report.runs) > MANY
    return to_jsonable(
        {
            "mode": config.mode,
            "runs": [run_entry(run, thin=thin) for run in report.runs],
            "table": list(report.table),
            **report.more,
            "counts": counts(report.runs),
            "sentence": report.headline,
            "notes": list(report.notes),
        }
    )


def run_entry(run: MarginRun, *, thin: bool) -> dict[str, Any]:
    """Return one run of the document."""
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


def write(config: MarginConfig, report: MarginReport, folder: Path) -> list[Path]:
    """Write the files, each whole, and return them."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = ({"run": run.run, "optimizer": run.optimizer, **row} for run in report.runs for row in run.rows)
    texts = {
        "trajectory.csv": to_csv(rows),
        "table.csv": to_csv(report.table),
        "table.md": markdown(report),
        **{f"{name}.csv": to_csv(table) for name, table in report.more.items()},
        "summary.json": json.dumps(summary(config, report), indent=2, allow_nan=False) + "\n",
        "report.html": page(config, report),
    }
    for name, text in texts.items():
        atomic.write_text(folder / name, text)
    return [folder / name for name in texts]


def summary(config: MarginConfig, report: MarginReport) -> dict[str, Any]:
    """Return the content of summary.json: settings, figures of each run, and the tables."""
    runs = [run_entry(run, thin=True) for run in report.runs]
    return to_jsonable(
        {
            "schema_version": SCHEMA_VERSION,
            "settings": config.settings(),
            "code_version": _version(),
            "sentence": report.headline,
            "counts": counts(report.runs),
            "notes": list(report.notes),
            "table": list(report.table),
            **report.more,
            "runs": [{key: value for key, value in run.items() if key != "trajectory"} for run in runs],
        }
    )


def page(config: MarginConfig, report: MarginReport) -> str:
    """Return the content of report.html."""
    tables = [_fitting(TextTable(*cells(report.table)))]
    tables += [
        _fitting(TextTable(*cells(rows), title=name.replace("_", " "))) for name, rows in report.more.items()
    ]
    return job_page.render(
        command="margin",
        kicker="Robustness margin",
        title=config.mode or "toy",
        question=report.question,
        headline=report.headline,
        scope=report.scope,
        notes=report.notes,
        tables=tables,
        plots=report.plots,
        settings={key: str(value) for key, value in config.settings().items()},
    )


def _fitting(table: TextTable) -> TextTable:
    """Return the table turned where it is wider than high: a page is narrow and long."""
    return table.transposed() if len(table.heads) > len(table.rows) + 1 else table


def cells(rows: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Return heads and cells of a readable table, without empty columns, with quartiles or intervals in brackets."""
    columns = [key for key in (rows[0] if rows else {}) if any(_text(row[key]) for row in rows)]
    shown = [key for key in columns if not key.endswith(BOUNDS)]
    return shown, [[_with_bounds(row, key) for key in shown] for row in rows]


def counts(runs: Sequence[MarginRun]) -> dict[str, dict[str, int]]:
    """Return optimizer → status → number of runs: those that died are counted, not averaged."""
    numbers: dict[str, dict[str, int]] = {}
    for run in runs:
        by_status = numbers.setdefault(run.optimizer, {})
        by_status[run.status] = by_status.get(run.status, 0) + 1
    return numbers


def markdown(report: MarginReport) -> str:
    """Return question, headline and tables as Markdown, and how many runs ended in each status."""
    main = _fitting(TextTable(*cells(report.table)))
    lines = [*([visible.markdown(report.question), ""] if report.question else [])]
    lines += [visible.markdown(report.headline), "", *markdown_lines(main.heads, main.rows)]
    for name, rows in report.more.items():
        table = _fitting(TextTable(*cells(rows)))
        lines += [
            "",
            visible.markdown(f"{name.replace('_', ' ')}:"),
            "",
            *markdown_lines(table.heads, table.rows),
        ]
    lines.append("")
    for name, by_status in counts(report.runs).items():
        text = ", ".join(f"{n} {status}" for status, n in by_status.items())
        lines.append(visible.markdown(f"{name}: {text}"))
    return "\n".join(lines) + "\n"


def to_csv(rows: Iterable[Mapping[str, Any]]) -> str:
    """Return CSV with the columns of all rows in order of appearance; what is not finite is empty."""
    listed = list(rows)
    columns = list(dict.fromkeys(key for row in listed for key in row))
    out = io.StringIO()
    writer = csv.DictWriter(out, columns, lineterminator="\n")
    writer.writeheader()
    for row in listed:
        writer.writerow({key: "" if _is_nothing(value) else csv_cell(value) for key, value in row.items()})
    return out.getvalue()


def _with_bounds(row: Mapping[str, Any], key: str) -> str:
    """Return the text of a value, to three digits where bounds or a standard deviation stand beside it."""
    sd = row.get(f"{key} sd")
    if sd is not None:
        return f"{row[key]:.3g} ± {sd:.2g}"
    low, high = (
        next((row[key + b] for b in ends if row.get(key + b) is not None), None) for ends in (LOW, HIGH)
    )
    if low is None or high is None:
        return _text(row[key])
    return f"{row[key]:.3g} [{low:.3g}, {high:.3g}]"


def _text(value: Any) -> str:
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


def mirror(
    config: MarginConfig, report: MarginReport, folder: Path, say: Callable[[str], None], exit_code: int
) -> None:
    """Log the shown runs to W&B row by row, then the table."""
    figures = {
        f"{row['optimizer']}/{key}": value
        for row in report.table
        for key, value in row.items()
        if key != "optimizer"
    }
    job_mirror.mirror(
        job_type="margin",
        wandb=config.wandb.model_dump(),
        group=config.group,
        run_id=uuid.uuid4().hex[:8],
        folder=folder,
        keys={"margin": to_jsonable(config.settings())},
        rows=_rows_by_state(shown_runs(report.runs)),
        summary=to_jsonable({"sentence": report.headline, "counts": counts(report.runs), **figures}),
        exit_code=exit_code,
        say=say,
    )


def _rows_by_state(runs: Sequence[MarginRun]) -> list[dict[str, Any]]:
    """Return a row per recorded state, optimizers side by side; `step` counts rows, since t may exceed any integer."""
    longest = max((len(run.rows) for run in runs), default=0)
    rows: list[dict[str, Any]] = []
    for i in range(longest):
        row: dict[str, Any] = {"step": i}
        for run in runs:
            if i < len(run.rows):
                state = run.rows[i]
                row |= {"t": state.get("t"), "ln_tau": state.get("ln_tau")}
                numbers = {k: v for k, v in state.items() if k not in ("t", "ln_tau", *UNLOGGED)}
                row |= {f"{run.optimizer}/{key}": value for key, value in numbers.items()}
        rows.append(
            {
                key: value
                for key, value in row.items()
                if value == value and value not in (None, float("-inf"))
            }
        )
    return rows
