"""What a margin job writes: trajectory.csv, summary.json, table.md and table.csv; and its JSON document."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from analysis.margin.settings import Settings
from analysis.margin.trajectory import Row, Run
from harness.record import atomic

SCHEMA_VERSION = 1
SHOWN_KEYS = ("t", "ln_tau", "gap", "margin")
TABLE_STEPS = (10**3, 10**4, 10**5, 10**6)
TABLE_LOSSES = (-5.0, -10.0, -20.0, -40.0)
"""ln of the loss at which optimizers are compared beside equal steps."""
MANY = 20


def document(settings: Settings, runs: Sequence[Run], notes: Sequence[str]) -> dict[str, Any]:
    """`{"runs": […], …}` of `--json`; numbers that are not finite are null.

    Of more than 20 runs the trajectories hold powers of ten only.
    """
    many = len(runs) > MANY
    return plain(
        {
            "mode": settings.mode,
            "runs": [described(run, thin=many) for run in runs],
            "table": table(runs),
            "counts": counts(runs),
            "notes": list(notes),
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


def write(settings: Settings, runs: Sequence[Run], notes: Sequence[str], folder: Path) -> list[Path]:
    """Write the files, each whole, and return them."""
    folder.mkdir(parents=True, exist_ok=True)
    summary = {
        "schema_version": SCHEMA_VERSION,
        "settings": plain(asdict(settings)),
        "code_version": _version(),
        "counts": counts(runs),
        "notes": list(notes),
        "runs": [
            {key: value for key, value in described(run, thin=False).items() if key != "trajectory"}
            for run in runs
        ],
    }
    rows = table(runs)
    texts = {
        "trajectory.csv": to_csv(
            {"run": run.run, "optimizer": run.optimizer, **row} for run in runs for row in run.rows
        ),
        "table.csv": to_csv(rows),
        "table.md": markdown(rows, counts(runs)),
    }
    for name, text in texts.items():
        atomic.write_text(folder / name, text)
    atomic.write_json(folder / "summary.json", plain(summary))
    return [folder / name for name in (*texts, "summary.json")]


def counts(runs: Sequence[Run]) -> dict[str, dict[str, int]]:
    """optimizer → status → number of runs: those that died are counted, not averaged."""
    found: dict[str, dict[str, int]] = {}
    for run in runs:
        by_status = found.setdefault(run.optimizer, {})
        by_status[run.status] = by_status.get(run.status, 0) + 1
    return found


def table(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """A row per optimizer: median and quartiles over the runs that separate the points, at equal steps and at
    equal loss."""
    rows = []
    for name in dict.fromkeys(run.optimizer for run in runs):
        alive = [run for run in runs if run.optimizer == name and run.status in ("ok", "flat")]
        classes = [run.rate.rate_class for run in alive]
        ratios = [run.rate.constant / run.predicted for run in alive if run.rate.constant and run.predicted]
        row: dict[str, Any] = {
            "optimizer": name,
            "runs": sum(run.optimizer == name for run in runs),
            "separated": len(alive),
            "rate_class": max(sorted(set(classes)), key=classes.count) if classes else None,
            "C_predicted": _median([run.predicted for run in alive]),
            "C_fit": _median([run.rate.constant for run in alive]),
            "C_fit/C_predicted": _median(ratios),
        }
        for t in TABLE_STEPS:
            row |= _spread(f"gap at {t:.0e}".replace("e+0", "e"), [_at_step(run.rows, t) for run in alive])
        for level in TABLE_LOSSES:
            row |= _spread(f"gap at ln L = {level:g}", [_at_loss(run.rows, level) for run in alive])
        rows.append(row)
    return rows


def markdown(rows: Sequence[Mapping[str, Any]], counted: Mapping[str, Mapping[str, int]]) -> str:
    """The table for people; columns without any number are left out."""
    columns = [key for key in (rows[0] if rows else {}) if any(_word(row[key]) for row in rows)]
    shown = [key for key in columns if not key.endswith((" q1", " q3"))]
    lines = ["| " + " | ".join(shown) + " |", "|" + "---|" * len(shown)]
    for row in rows:
        cells = [_word(row[key]) + _quartiles(row, key) for key in shown]
        lines.append("| " + " | ".join(cells) + " |")
    lines.append("")
    for name, by_status in counted.items():
        lines.append(f"{name}: " + ", ".join(f"{n} {status}" for status, n in by_status.items()))
    return "\n".join(lines) + "\n"


def to_csv(rows: Iterable[Mapping[str, Any]]) -> str:
    """CSV with the columns of all rows, in the order in which they appear; what is not finite is empty."""
    listed = list(rows)
    columns = list(dict.fromkeys(key for row in listed for key in row))
    out = io.StringIO()
    writer = csv.DictWriter(out, columns, lineterminator="\n")
    writer.writeheader()
    for row in listed:
        writer.writerow({key: "" if _is_nothing(value) else value for key, value in row.items()})
    return out.getvalue()


def plain(value: Any) -> Any:
    """JSON data: tuples as lists, numbers that are not finite as null."""
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _at_step(rows: Sequence[Row], t: int) -> float | None:
    return next((row["gap"] for row in rows if row["t"] is not None and abs(row["t"] - t) < 0.5), None)


def _at_loss(rows: Sequence[Row], level: float) -> float | None:
    """The gap where ln L passes a level, interpolated in ln L between two states."""
    for before, after in pairwise(rows):
        high, low = before["log_loss"], after["log_loss"]
        if high > level >= low:
            share = (high - level) / (high - low)
            return before["gap"] + share * (after["gap"] - before["gap"])
    return None


def _spread(key: str, values: Sequence[float | None]) -> dict[str, float | None]:
    found = [value for value in values if value is not None]
    if len(found) < 2:
        return {key: found[0] if found else None, f"{key} q1": None, f"{key} q3": None}
    low, middle, high = (float(q) for q in np.quantile(found, (0.25, 0.5, 0.75)))
    return {key: middle, f"{key} q1": low, f"{key} q3": high}


def _median(values: Sequence[float | None]) -> float | None:
    found = [value for value in values if value is not None]
    return float(np.median(found)) if found else None


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
