"""Runs of other trainers, read from CSV and JSONL tables; docs/report.md describes the format.

A row is one logged step of one run. ``optimizer`` and ``seed`` say which run it belongs to; its other cells are
metrics (the keys of `harness.record.schema.METRICS`) or facts of the run (`TEXTS`, `NUMBERS`, `NESTED`), which
may stand in any row, also in one without a step. What can't be read costs a note with its line, never the file.
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
from analysis.runs import external_rows
from analysis.runs.reading import Columns
from analysis.runs.run import Run
from harness.files.bounded import UnreadableFile
from harness.record.schema import METRICS, STATES

ALIASES = {"val_loss": "val/loss", "train_loss": "train/loss", "seconds": "wall_s"}
"""Other spellings of metric keys."""
TEXTS = ("comparison_key", "state", "reason", "lr_source", "precision", "device", "engine", "command")
NAMES = ("model", "data")
"""Facts that are a name in words."""
NUMBERS = ("steps_planned", "world_size", "parameters", "epochs", "unigram_entropy", "train_tokens_available")
NUMBERS += ("tokens_per_s", "step_ms", "skipped_steps", "optimizer_fallbacks")
FLAGS = ("lr_tuned",)
NESTED = ("state_bytes", "memory_bytes", "time_s")
"""Facts by kind: ``state_bytes.moment``; an object in JSONL."""
OPTION = "optimizer."
"""Prefix of an option that makes an arm of its own: ``optimizer.rank``."""
LOSSES = ("val/loss", "train/loss")
OWN = ("comparison.csv",)
"""Tables that a report itself leaves."""


@dataclass
class _Gathered:
    """The rows of one run, and what they say of it as a whole."""

    rows: dict[float, dict[str, float]] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    repeated: int = 0


def may_be(name: str) -> bool:
    """Whether a file of this name is looked into."""
    return Path(name).suffix.lower() in (".csv", ".jsonl") and name not in OWN and not name.startswith(".")


def read(path: Path, root: Path, remarks: list[str]) -> list[Run]:
    """The runs of one table, in the order of their first rows; a remark, and no run, if it holds none."""
    where = path.relative_to(root).as_posix()
    complaints: list[str] = []
    try:
        lines = list(external_rows.rows(path, complaints))
    except (FileNotFoundError, UnreadableFile) as error:
        remarks.append(f"{where} is not read: {error}")
        return []
    lines = [(line, {ALIASES.get(key, key): value for key, value in row.items()}) for line, row in lines]
    keys = dict.fromkeys(key for _, row in lines for key in row)
    if "step" not in keys or not any(loss in keys for loss in LOSSES):
        said = f" ({complaints[0]})" if complaints else ""
        remarks.append(f"{where} is not read: it has no column step, or none of {', '.join(LOSSES)}{said}")
        return []
    runs: dict[tuple[str, int], _Gathered] = {}
    for line, row in lines:
        problem = _take(row, path.stem, runs)
        complaints += [f"line {line}: {text}" for text in problem]
    if not runs:
        said = "; ".join(complaints[:2]) or "it has no rows"
        remarks.append(f"{where} holds no run: {said}")
    notes = _file_notes(keys, complaints)
    return [_run(key, found, path, where, notes) for key, found in runs.items()]


def _take(row: Mapping[str, Any], stem: str, runs: dict[tuple[str, int], _Gathered]) -> list[str]:
    """Put one row where it belongs; what is wrong with it, in words."""
    named, said = _of_name(stem), []
    optimizer = str(row.get("optimizer") or "").strip() or named[0]
    seed = external_rows.value(row.get("seed")) if row.get("seed") not in (None, "") else named[1]
    if not isinstance(seed, int | float) or not math.isfinite(seed) or seed != int(seed) or seed < 0:
        return [f"seed {row.get('seed')!r} is no whole number from 0 on; the row is left out"]
    has_step = row.get("step") not in (None, "")
    step = _number("step", row["step"])[0] if has_step else math.nan
    if has_step and not (math.isfinite(step) and step >= 0):
        return [f"step {row['step']!r} is no number from 0 on; the row is left out"]
    found = runs.setdefault((optimizer, int(seed)), _Gathered())
    values: dict[str, float] = {}
    for key, cell in row.items():
        if cell is None or cell == "":
            if key in LOSSES and cell is None:
                values[key] = math.nan  # JSON's null: a loss that was not finite
        elif key in METRICS and key != "step":
            values[key], problem = _number(key, cell)
            said += problem
        elif key not in ("optimizer", "seed", "step"):
            said += _fact(key, cell, found)
    if not has_step:
        return [*said, "has losses but no step"] if any(loss in values for loss in LOSSES) else said
    before = found.rows.setdefault(step, {})
    found.repeated += not values.keys().isdisjoint(before)  # a row of each loss is one step in two rows
    before.update(values)
    return said


def _fact(key: str, cell: Any, found: _Gathered) -> list[str]:
    """Record a fact of the run; what is wrong with it, in words."""
    kind, _, part = key.partition(".")
    if key in TEXTS or key in NAMES:
        found.facts[key] = str(cell)
    elif key in FLAGS:
        flag = external_rows.flag(cell)
        if flag is None:
            return [f"{key} {cell!r} is neither true nor false"]
        found.facts[key] = flag
    elif key in NUMBERS or (kind in NESTED and part):
        value, problem = _number(key, cell)
        if problem or not math.isfinite(value):
            return problem or [f"{key} {cell!r} is not finite"]
        if part:
            found.facts.setdefault(kind, {})[part] = value
        else:
            found.facts[key] = value
    elif key.startswith(OPTION):
        found.facts.setdefault("options", {})[key.removeprefix(OPTION)] = external_rows.value(cell)
    return []


def _number(key: str, cell: Any) -> tuple[float, list[str]]:
    value = external_rows.value(cell)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return math.nan, [f"{key} {cell!r} is no number"]
    try:
        return float(value), []
    except OverflowError:
        return math.nan, [f"{key} is too large"]


def _of_name(stem: str) -> tuple[str, int]:
    """Optimizer and seed from a file name: ``soap-seed3`` → soap, 3; ``soap`` → soap, 0."""
    matched = re.fullmatch(r"(.+?)[-_.]?seed[-_]?(\d+)", stem)
    return (matched[1], int(matched[2])) if matched else (stem, 0)


def _file_notes(keys: Iterable[str], complaints: list[str]) -> list[str]:
    known = {"step", "optimizer", "seed", *METRICS, *TEXTS, *NAMES, *NUMBERS, *FLAGS}
    prefixes = (OPTION, *(f"{kind}." for kind in NESTED))
    other = [key or "(without a name)" for key in keys if key not in known and not key.startswith(prefixes)]
    notes = []
    if other:
        more = f" and {len(other) - 8} more" if len(other) > 8 else ""
        notes.append(f"columns that are not used: {', '.join(other[:8])}{more}")
    if complaints:
        more = f"; {len(complaints) - 4} more such lines" if len(complaints) > 4 else ""
        notes.append(f"{'; '.join(complaints[:4])}{more}")
    return notes


def _run(key: tuple[str, int], found: _Gathered, path: Path, where: str, notes: list[str]) -> Run:
    optimizer, seed = key
    metrics = _columns(found.rows)
    facts = {k: v for k, v in found.facts.items() if k not in (*NAMES, "options")}
    summary = {"optimizer": optimizer, "seed": seed, **_last(metrics), **facts}
    rates = metrics.get("lr")
    if rates is not None and np.isfinite(rates).any():
        summary["lr"] = float(np.nanmax(rates))
    options = {"name": optimizer, **({"lr": summary["lr"]} if "lr" in summary else {})}
    run = Run(
        folder=path,
        where=f"{where} ({optimizer}, seed {seed})",
        config={
            "optimizer": {**options, **found.facts.get("options", {})},
            **{name: {"name": found.facts[name]} for name in NAMES if name in found.facts},
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
        notes=[*found.notes, *notes],
        foreign=True,
    )
    if found.repeated:
        run.notes.append(f"{formatting.plural(found.repeated, 'step')} logged twice; the later row is used")
    _judge(run, found.rows)
    return run


def _columns(rows: Mapping[float, Mapping[str, float]]) -> Columns:
    if not rows:
        return {}
    steps = sorted(rows)
    keys = sorted({key for row in rows.values() for key in row})
    columns = {key: np.array([rows[step].get(key, math.nan) for step in steps]) for key in keys}
    return {"step": np.array(steps, float), **columns}


def _last(metrics: Columns) -> dict[str, float]:
    """What the last row says of the run as a whole."""
    if not metrics:
        return {}
    kept = {"step": "steps", "tokens": "tokens", "wall_s": "wall_s", "val/loss": "val/loss"}
    kept |= {"train/loss": "train/loss"}
    found = {new: float(metrics[old][-1]) for old, new in kept.items() if old in metrics}
    losses = metrics.get("val/loss")
    if losses is not None and np.isfinite(losses).any():
        found["best_val_loss"] = float(np.nanmin(losses))
    return {key: value for key, value in found.items() if math.isfinite(value)}


def _judge(run: Run, rows: Mapping[float, Mapping[str, float]]) -> None:
    """The state of the run: what the table says, else whether it reached its last step with a finite loss."""
    said, planned = run.text("state"), run.fact("steps_planned")
    if said and said not in STATES:
        run.notes.append(f"state {said!r} is unknown (known: {', '.join(STATES)}): it counts as failed")
        run.state, run.reason = "failed", run.reason or f"unknown state {said}"
        return
    run.state = said or ("interrupted" if run.steps < planned else "finished")
    if run.state == "interrupted" and not run.reason:
        run.reason = f"the table ends at step {run.steps:g} of {planned:g}"
    if run.state == "finished" and not run.finished:
        run.state, run.reason = _without_loss(run, rows)


def _without_loss(run: Run, rows: Mapping[float, Mapping[str, float]]) -> tuple[str, str]:
    """What became of a run that is over and has no finite validation loss at its last step."""
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
