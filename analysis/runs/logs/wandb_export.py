"""Read W&B exports: the history of a run or a table of runs as CSV, JSON or JSONL, and the CSV of a panel.

* History: rows with a step and metrics, as `wandb.Api().run(…).history()` or `scan_history()` gives them; with a column
  that names the run (``Name``, ``run``), the rows of several runs.
* Panel: a column for each run, ``RUN - val/loss``, next to those of its range (``…__MIN``, ``…__MAX``).
* JSON with ``config``, ``summary`` and ``history`` of one run, or a list of such; also the ``summary.json`` that
  epfml's llm-optimizer-benchmark writes (``args``, ``eval_history``), and exports without a history (`final_only`).

Spellings of published projects (marin, epfml's benchmark, nanochat, Lightning) are in `SPELLINGS`; of several columns
for one metric the first one of the list counts, and a note names it.
"""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from analysis.formatting import plural
from analysis.runs.logs import final_only
from analysis.runs.logs.log_run import LogRun, Provenance
from analysis.runs.logs.workload import names_workload
from analysis.runs.reading import to_columns
from harness.record.tables import parse_value

SPELLINGS: dict[str, tuple[str, ...]] = {
    "step": ("step", "iter", "global_step", "trainer/global_step", "train/step", "Step", "_step"),
    "val/loss": (
        "val/loss", "final-val/loss", "eval/paloma/c4_en/loss", "eval/loss", "validation/loss", "valid/loss",
        "val_loss", "eval_loss", "final_val_loss",
    ),
    "val/bits_per_byte": ("val/bpb", "eval/bpb", "eval/paloma/c4_en/bpb"),
    "train/loss": ("train/loss", "training/loss", "train_loss", "loss"),
    "tokens": ("tokens", "throughput/total_tokens", "consumed_tokens", "total_tokens"),
    "wall_s": ("total_training_time", "_runtime", "Relative Time (Process)"),
    "lr": ("lr", "optim/learning_rate", "train/lr", "learning_rate"),
}  # fmt: skip
"""Our metric key → columns of published exports, the first one that a file has counts."""
FINAL = ("final-val/loss", "final_val_loss")
"""Columns that only the last evaluation has: they fill rows without another loss."""
LOSSES = ("val/loss", "val/bits_per_byte", "train/loss")
RUN_NAMES = ("Name", "name", "run_name", "run", "ID", "run_id")
OPTIMIZERS = ("optimizer.name", "optimizer.type", "optimizer_name", "optimizer", "opt")
SEEDS = ("seed", "trainer.seed", "train.seed")
PLANNED = ("iterations", "num_train_steps", "trainer.num_train_steps", "num_iterations", "max_steps")
NOT_SETTINGS = re.compile(
    r"(^|[._])(seed|data_seed|name|id|path|dir|folder|project|entity|group|tags?|device|run_prefix|world_size)$|^_|path|dir\b"
)
"""Configuration keys that name a run, a place or a machine."""
_PANEL = re.compile(r"^(?P<run>.+) - (?P<metric>.+?)(?P<range>__MIN|__MAX)?$")

Row = Mapping[str, Any]


def read(text: str, provenance: Provenance) -> list[LogRun]:
    """Return the runs of one export; empty if it has no steps or no losses."""
    if provenance.path.suffix.lower() == ".csv":
        rows = list(csv.DictReader(io.StringIO(text.removeprefix("\ufeff"))))
        panel = _panel(rows, provenance)
        return panel or _tabulated(rows, provenance, [])
    notes: list[str] = []
    documents = _documents(text, notes)
    whole = [run for document in documents for run in final_only.with_history(document) if _is_run(run)]
    if whole:
        return [run for document in whole for run in _document(document, provenance)]
    return _tabulated(documents, provenance, notes)


def _documents(text: str, notes: list[str]) -> list[dict[str, Any]]:
    """Return the objects of a JSON or JSONL text; each line that is neither adds a note."""
    try:
        parsed: Any = json.loads(text)
    except ValueError:
        parsed = []
        for number, line in enumerate(text.splitlines(), 1):
            if not line.strip():
                continue
            try:
                parsed.append(json.loads(line))
            except ValueError:
                notes.append(f"line {number} is not JSON")
    parsed = parsed if isinstance(parsed, list) else [parsed]
    return [document for document in parsed if isinstance(document, dict)]


def _is_run(document: Row) -> bool:
    return any(isinstance(document.get(key), dict | list) for key in ("history", "eval_history"))


def _document(document: Row, provenance: Provenance) -> list[LogRun]:
    """Return the run of an object with its history, and its configuration if it has one."""
    rows = _rows(document.get("history") or document.get("eval_history") or [])
    # args are those of epfml's summary.json, whose evaluations have a plain val_loss.
    config = _flat(document.get("config") or document.get("args") or {})
    summary = document.get("summary")
    runs = _tabulated(rows, provenance, document.get("notes") or [])
    if isinstance(summary, Mapping) and runs:
        runs = [_with_final(runs[0], summary), *runs[1:]]
    return [_with_config(run, config) for run in runs]


def _rows(history: Any) -> list[Row]:
    """Return a list of rows; columns as mappings from name to list become rows."""
    if isinstance(history, Mapping):
        columns = {key: value for key, value in history.items() if isinstance(value, list)}
        length = max(map(len, columns.values()), default=0)
        return [{key: value[i] for key, value in columns.items() if i < len(value)} for i in range(length)]
    return [row for row in history if isinstance(row, Mapping)]


def _with_final(run: LogRun, summary: Row) -> LogRun:
    """Return the run with the loss of its summary at the summary's step, where the history was thinned out.

    A run whose summary states a loss that is not finite diverged, whatever the history has kept.
    """
    step = _number(_first(summary, SPELLINGS["step"]))
    stated = {key: _first(summary, SPELLINGS[key]) for key in ("val/loss", "val/bits_per_byte")}
    values = {key: _number(value) for key, value in stated.items() if _is_number(value)}
    if not all(map(math.isfinite, values.values())):
        return replace(run, diverged=True)
    if not values or not step >= run.last_step:
        return run
    rows = _by_step(run)
    rows.setdefault(step, {}).update(values)
    return replace(run, columns=to_columns(rows))


def _by_step(run: LogRun) -> dict[float, dict[str, float]]:
    keys = [key for key in run.columns if key != "step"]
    return {
        float(step): {key: float(run.columns[key][i]) for key in keys if math.isfinite(run.columns[key][i])}
        for i, step in enumerate(run.columns["step"])
    }


def _with_config(run: LogRun, config: Row) -> LogRun:
    settings = {
        key: value
        for key, value in config.items()
        if isinstance(value, bool | int | float | str)
        and (names_workload(key) or not NOT_SETTINGS.search(key))
    }
    optimizer = _first(config, OPTIMIZERS)
    return replace(
        run,
        settings={**run.settings, **settings},
        planned=_number(_first(config, PLANNED)),
        optimizer=str(optimizer) if isinstance(optimizer, str) else run.optimizer,
        seed=_seed(_first(config, SEEDS)) if run.seed is None else run.seed,
    )


def _flat(config: Any, prefix: str = "") -> dict[str, Any]:
    """Return a configuration with dotted keys, without the ``{"value": …}`` around entries of W&B's own files."""
    flat: dict[str, Any] = {}
    for key, value in config.items() if isinstance(config, Mapping) else ():
        if isinstance(value, Mapping) and set(value) <= {"value", "desc"} and "value" in value:
            value = value["value"]
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _tabulated(rows: Sequence[Row], provenance: Provenance, notes: Iterable[str]) -> list[LogRun]:
    """Return the runs of rows that have a step and a loss, one for each name of a run."""
    names = dict.fromkeys(key for row in rows for key in row)
    columns = {key: [name for name in spellings if name in names] for key, spellings in SPELLINGS.items()}
    if not columns["step"] or not any(columns[key] for key in LOSSES):
        return []
    name = next((key for key in RUN_NAMES if key in names), None)
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault("" if name is None else str(row.get(name) or ""), []).append(row)
    choices = tuple(
        f"{key} is read from {found[0]}; not from {', '.join(found[1:])}"
        for key, found in columns.items()
        if key != "step" and len([c for c in found if c not in FINAL]) > 1
    )
    return [
        run
        for run_name, members in groups.items()
        if (run := _run(members, columns, run_name, provenance, (*notes, *choices))) is not None
    ]


def _run(
    rows: Sequence[Row],
    columns: Mapping[str, list[str]],
    name: str,
    provenance: Provenance,
    notes: tuple[str, ...],
) -> LogRun | None:
    by_step: dict[float, dict[str, float]] = {}
    config: dict[str, Any] = {}
    changed: set[float] = set()
    for row in rows:
        step = _number(_first(row, columns["step"]))
        stated = (key for key in row if key in OPTIMIZERS or key in SEEDS or names_workload(key))
        config |= {key: row[key] for key in stated if row.get(key) not in (None, "")}
        if not (math.isfinite(step) and step >= 0):
            continue
        values = {}
        for key, found in columns.items():
            # The first spelling counts; the last evaluation has a column of its own in some projects.
            kept = [*[c for c in found if c not in FINAL][:1], *[c for c in found if c in FINAL]]
            text = _first(row, kept)
            if key != "step" and text is not None:
                values[key] = _number(text)
        known = by_step.setdefault(step, {})
        if any(known.get(key, values[key]) != values[key] for key in values.keys() & LOSSES):
            changed.add(step)
        known.update(values)
    if changed:
        notes = (
            *notes,
            f"{plural(len(changed), 'step')} logged twice with another loss; the later row is used",
        )
    if not any(key in row for row in by_step.values() for key in LOSSES):
        return None
    optimizer = _first(config, OPTIMIZERS)
    losses = [row["val/loss"] for _, row in sorted(by_step.items()) if "val/loss" in row]
    return LogRun(
        to_columns(by_step),
        provenance,
        {
            **({"run": name} if name else {}),
            **{key: value for key, value in config.items() if names_workload(key)},
        },
        optimizer=str(optimizer) if optimizer else None,
        seed=_seed(_first(config, SEEDS)),
        diverged=bool(losses) and not math.isfinite(losses[-1]),
        notes=notes,
    )


def _panel(rows: Sequence[Row], provenance: Provenance) -> list[LogRun]:
    """Return the runs of a panel's CSV; empty if the table is none."""
    names = list(dict.fromkeys(key for row in rows for key in row if key))
    if not names:
        return []
    runs: dict[str, dict[float, dict[str, float]]] = {}
    for column in names[1:]:
        matched = _PANEL.match(column)
        if matched is None or matched["range"]:
            continue
        key = next((key for key, spelled in SPELLINGS.items() if matched["metric"] in spelled), None)
        if key is None or key == "step":
            continue
        for row in rows:
            x, value = _number(row.get(names[0])), row.get(column)
            if math.isfinite(x) and value not in (None, ""):
                runs.setdefault(matched["run"], {}).setdefault(x, {})[key] = _number(value)
    return [
        LogRun(to_columns(by_step), provenance, {"run": run}, notes=(f"the steps are the column {names[0]}",))
        for run, by_step in runs.items()
        if any(key in row for row in by_step.values() for key in LOSSES)
    ]


def _first(row: Row, keys: Iterable[str]) -> Any:
    """Return the first value that is neither absent nor empty; None without one."""
    return next((row[key] for key in keys if row.get(key) not in (None, "")), None)


def _is_number(value: Any) -> bool:
    """Return True for numbers and their texts, NaN and infinities included."""
    parsed = parse_value(value) if isinstance(value, str) else value
    return isinstance(parsed, int | float) and not isinstance(parsed, bool)


def _number(value: Any) -> float:
    return float(parse_value(value) if isinstance(value, str) else value) if _is_number(value) else math.nan


def _seed(value: Any) -> int | None:
    number = _number(value)
    return int(number) if number >= 0 and number == int(number) else None
