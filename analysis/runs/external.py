"""Read runs of other trainers from CSV and JSONL tables; docs/report.md describes the format.

A row is one logged step of one run. ``optimizer`` and ``seed`` name the run; the other cells are metrics (the
keys of `harness.record.schema.METRICS`) or facts of the run (`TEXTS`, `NUMBERS`, `NESTED`), which may be in any
row, also in one without a step. An unreadable line costs a note with its number, never the file.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from analysis import formatting
from analysis.runs.reading import Columns, to_columns
from analysis.runs.run import LoadedRun
from harness.files.bounded import UnreadableFile
from harness.record.schema import METRICS, STATES
from harness.record.tables import LOSSES, parse_value, read_rows

TEXTS = ("comparison_key", "state", "reason", "lr_source", "precision", "device", "engine", "command")
NAMES = ("model", "data")
"""Facts that are the name of a configuration."""
NUMBERS = ("steps_planned", "world_size", "parameters", "epochs", "unigram_entropy", "train_tokens_available")
NUMBERS += ("tokens_per_s", "step_ms", "skipped_steps", "optimizer_fallbacks")
FLAGS = ("lr_tuned",)
NESTED = ("state_bytes", "memory_bytes", "time_s")
"""Facts by kind: ``state_bytes.moment``; an object in JSONL."""
OPTION = "optimizer."
"""Prefix of an optimizer option (``optimizer.rank``); runs that differ in one belong to different arms."""
REPORT_TABLES = ("comparison.csv",)
"""Tables that a report itself writes."""


@dataclass
class _RunRows:
    """The rows of one run by step, and the facts that they state about the run."""

    rows: dict[float, dict[str, float]] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    repeated: int = 0


def is_table_name(name: str) -> bool:
    """Return True if a file of this name may be a table of runs."""
    return (
        Path(name).suffix.lower() in (".csv", ".jsonl")
        and name not in REPORT_TABLES
        and not name.startswith(".")
    )


def read(path: Path, root: Path, remarks: list[str]) -> list[LoadedRun]:
    """Return the runs of one table in the order of their first rows; add a remark if there are none."""
    where = path.relative_to(root).as_posix()
    complaints: list[str] = []
    try:
        lines = list(read_rows(path, complaints))
    except (FileNotFoundError, UnreadableFile) as error:
        remarks.append(f"{where} is not read: {error}")
        return []
    keys = dict.fromkeys(key for _, row in lines for key in row)
    if "step" not in keys or not any(loss in keys for loss in LOSSES):
        detail = f" ({complaints[0]})" if complaints else ""
        remarks.append(f"{where} is not read: it has no column step, or none of {', '.join(LOSSES)}{detail}")
        return []
    runs: dict[tuple[str, int], _RunRows] = {}
    for line, row in lines:
        complaints += [f"line {line}: {problem}" for problem in _add_row(row, path.stem, runs)]
    if not runs:
        detail = "; ".join(complaints[:2]) or "it has no rows"
        remarks.append(f"{where} holds no run: {detail}")
    notes = _file_notes(keys, complaints)
    return [_build_run(key, rows, path, where, notes) for key, rows in runs.items()]


def _add_row(row: Mapping[str, Any], stem: str, runs: dict[tuple[str, int], _RunRows]) -> list[str]:
    """Add a row to its run; return what is wrong with it."""
    from_name, problems = _parse_name(stem), []
    optimizer = str(row.get("optimizer") or "").strip() or from_name[0]
    seed = parse_value(row.get("seed")) if row.get("seed") not in (None, "") else from_name[1]
    if not isinstance(seed, int | float) or not math.isfinite(seed) or seed != int(seed) or seed < 0:
        return [f"seed {row.get('seed')!r} is not a whole number ≥ 0; the row is skipped"]
    has_step = row.get("step") not in (None, "")
    step = _number("step", row["step"])[0] if has_step else math.nan
    if has_step and not (math.isfinite(step) and step >= 0):
        return [f"step {row['step']!r} is not a number ≥ 0; the row is skipped"]
    run = runs.setdefault((optimizer, int(seed)), _RunRows())
    values: dict[str, float] = {}
    for key, cell in row.items():
        if cell is None or cell == "":
            if key in LOSSES and cell is None:
                values[key] = math.nan  # JSON's null: a loss that was not finite
        elif key in METRICS and key != "step":
            values[key], problem = _number(key, cell)
            problems += problem
        elif key not in ("optimizer", "seed", "step"):
            problems += _add_fact(key, cell, run)
    if not has_step:
        return [*problems, "has losses but no step"] if any(loss in values for loss in LOSSES) else problems
    before = run.rows.setdefault(step, {})
    # A step may be spread over rows with different keys; only a key that comes twice is a repetition.
    run.repeated += not values.keys().isdisjoint(before)
    before.update(values)
    return problems


def _add_fact(key: str, cell: Any, run: _RunRows) -> list[str]:
    """Record a fact of the run; return what is wrong with it."""
    kind, _, part = key.partition(".")
    if key in TEXTS or key in NAMES:
        run.facts[key] = str(cell)
    elif key in FLAGS:
        flag = parse_flag(cell)
        if flag is None:
            return [f"{key} {cell!r} is neither true nor false"]
        run.facts[key] = flag
    elif key in NUMBERS or (kind in NESTED and part):
        value, problem = _number(key, cell)
        if problem or not math.isfinite(value):
            return problem or [f"{key} {cell!r} is not finite"]
        if part:
            run.facts.setdefault(kind, {})[part] = value
        else:
            run.facts[key] = value
    elif key.startswith(OPTION):
        run.facts.setdefault("options", {})[key.removeprefix(OPTION)] = parse_value(cell)
    return []


def _number(key: str, cell: Any) -> tuple[float, list[str]]:
    value = parse_value(cell)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return math.nan, [f"{key} {cell!r} is not a number"]
    try:
        return float(value), []
    except OverflowError:
        return math.nan, [f"{key} is too large"]


def _parse_name(stem: str) -> tuple[str, int]:
    """Return optimizer and seed from a file name: ``soap-seed3`` → soap, 3; ``soap`` → soap, 0."""
    matched = re.fullmatch(r"(.+?)[-_.]?seed[-_]?(\d+)", stem)
    return (matched[1], int(matched[2])) if matched else (stem, 0)


def _file_notes(keys: Iterable[str], complaints: list[str]) -> list[str]:
    known = {"step", "optimizer", "seed", *METRICS, *TEXTS, *NAMES, *NUMBERS, *FLAGS}
    prefixes = (OPTION, *(f"{kind}." for kind in NESTED))
    other = [key or "(without a name)" for key in keys if key not in known and not key.startswith(prefixes)]
    notes = []
    if other:
        more = f" and {len(other) - 8} more" if len(other) > 8 else ""
        notes.append(f"unused columns: {', '.join(other[:8])}{more}")
    if complaints:
        more = f"; {formatting.plural(len(complaints) - 4, 'more such line')}" if len(complaints) > 4 else ""
        notes.append(f"{'; '.join(complaints[:4])}{more}")
    return notes


def _build_run(key: tuple[str, int], rows: _RunRows, path: Path, where: str, notes: list[str]) -> LoadedRun:
    optimizer, seed = key
    metrics = to_columns(rows.rows)
    facts = {k: v for k, v in rows.facts.items() if k not in (*NAMES, "options")}
    summary = {"optimizer": optimizer, "seed": seed, **_last(metrics), **facts}
    rates = metrics.get("lr")
    if rates is not None and np.isfinite(rates).any():
        summary["lr"] = float(np.nanmax(rates))
    options = {"name": optimizer, **({"lr": summary["lr"]} if "lr" in summary else {})}
    run = LoadedRun(
        folder=path,
        where=f"{where} ({optimizer}, seed {seed})",
        config={
            "optimizer": {**options, **rows.facts.get("options", {})},
            **{name: {"name": rows.facts[name]} for name in NAMES if name in rows.facts},
        },
        summary=summary,
        status={},
        environment={},
        parameters=[],
        metrics=metrics,
        moments=pd.DataFrame(),
        state="running",
        reason=str(facts.get("reason") or ""),
        comparison_key=str(facts.get("comparison_key") or f"table:{where}"),
        notes=notes.copy(),
        is_external=True,
    )
    if rows.repeated:
        run.notes.append(f"{formatting.plural(rows.repeated, 'step')} logged twice; the later row is used")
    _set_state(run, rows.rows)
    return run


def _last(metrics: Columns) -> dict[str, float]:
    """Return the summary values that the last row states."""
    if not metrics:
        return {}
    kept = {"step": "steps", "tokens": "tokens", "wall_s": "wall_s", "val/loss": "val/loss"}
    kept |= {"train/loss": "train/loss"}
    summary = {new: float(metrics[old][-1]) for old, new in kept.items() if old in metrics}
    losses = metrics.get("val/loss")
    if losses is not None and np.isfinite(losses).any():
        summary["best_val_loss"] = float(np.nanmin(losses))
    return {key: value for key, value in summary.items() if math.isfinite(value)}


def _set_state(run: LoadedRun, rows: Mapping[float, Mapping[str, float]]) -> None:
    """Set the run's state: the one that the table states, else the one that its last step shows."""
    stated, planned = run.text("state"), run.fact("steps_planned")
    if stated and stated not in STATES:
        run.notes.append(f"state {stated!r} is unknown (known: {', '.join(STATES)}): it counts as failed")
        run.state, run.reason = "failed", run.reason or f"unknown state {stated}"
        return
    run.state = stated or ("interrupted" if run.steps < planned else "finished")
    if run.state == "interrupted" and not run.reason:
        run.reason = f"the table ends at step {run.steps:g} of {planned:g}"
    if run.state == "finished" and not run.finished:
        run.state, run.reason = _state_without_loss(run, rows)


def _state_without_loss(run: LoadedRun, rows: Mapping[float, Mapping[str, float]]) -> tuple[str, str]:
    """Return state and reason of an ended run without a finite validation loss at its last step."""
    if not rows:
        return "failed", "the table has no row with a step"
    last = rows[max(rows)]
    if any(key in last and not math.isfinite(last[key]) for key in LOSSES):
        return "diverged", f"the loss is not finite at step {run.steps:g}"
    evaluated = [step for step, row in rows.items() if math.isfinite(row.get("val/loss", math.nan))]
    if not evaluated:
        return "failed", "no finite validation loss"
    return (
        "failed",
        f"no validation loss at its last step {run.steps:g} (the last one is at step {max(evaluated):g})",
    )


_FLAGS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


def parse_flag(cell: Any) -> bool | None:
    """Return the truth value of a cell; None if it is neither true nor false."""
    return cell if isinstance(cell, bool) else _FLAGS.get(str(cell).strip().lower())
