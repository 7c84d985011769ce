"""Load all runs below a folder. `harness.record.schema` describes the format of a run folder.

Runs of other trainers are read from the same files (`metrics.jsonl` and `summary.json` are enough) or from CSV
and JSONL tables (`external`); docs/report.md describes both.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from analysis import formatting
from analysis.runs import external, predictions, reading
from analysis.runs.reading import number
from analysis.runs.run import LoadedRun
from harness.errors import InputError
from harness.record.folder import JOBS
from harness.record.readers import Environment, Status, Summary
from harness.record.schema import SCHEMA_VERSION, STATES

# Keys that may differ between runs whose losses are compared: the arm, the seed, and what does not change a loss.
NOT_COMPARED = ("optimizer", "seed", "name", "group", "runs_dir", "engine", "world_size", "micro_batch_size")
NOT_COMPARED += (
    "log_every",
    "eval",
    "moments",
    "wandb",
    "overwrite",
    "checkpoint",
    "profile",
    "time_limit",
    "resume",
)
_MARKS = ("config.yaml", "metrics.jsonl", "summary.json", "status.json")


def load(folder: str | Path, remarks: list[str] | None = None) -> list[LoadedRun]:
    """Load all runs below ``folder`` (or ``folder`` itself) in the order of their paths; it may hold none.

    Args:
        folder: where to look.
        remarks: receives a line for each table that looks like external runs but holds none, and for each folder
            that cannot be listed.

    Raises:
        InputError: the folder does not exist.
    """
    root = Path(folder)
    if not root.is_dir():
        raise InputError("report", folder, "is not a folder", fix="optbench report runs/GROUP")
    runs: list[LoadedRun] = []
    remarks = [] if remarks is None else remarks
    for path in sorted(_sources(root, remarks)):
        if path.is_dir():
            runs.append(_load_folder(path, root))
        else:
            runs.extend(external.read(path, root, remarks))
    _fill_comparison_keys(runs)
    return runs


def _sources(root: Path, remarks: list[str]) -> Iterator[Path]:
    """Yield run folders, and tables outside of run folders."""

    def note(error: OSError) -> None:
        remarks.append(f"{error.filename} cannot be listed ({error.strerror})")

    for directory, below, files in os.walk(root, onerror=note):
        if any(mark in files for mark in _MARKS):
            below.clear()
            yield Path(directory)
            continue
        # A run that was replaced is archived under a name with a leading dot.
        below[:] = sorted(name for name in below if not name.startswith(".") and name != JOBS)
        yield from (Path(directory, name) for name in files if external.is_table_name(name))


def _load_folder(folder: Path, root: Path) -> LoadedRun:
    notes: list[str] = []
    config = reading.mapping(folder / "config.yaml", notes, required=True)
    summary = reading.record(folder / "summary.json", Summary, notes)
    status = reading.record(folder / "status.json", Status, notes)
    version = number(summary.get("schema_version", status.get("schema_version")))
    if version < SCHEMA_VERSION:
        notes.append(f"written by schema {version:g}, this is {SCHEMA_VERSION}: missing values stay blank")
    elif version > SCHEMA_VERSION:
        notes.append(
            f"written by the newer schema {version:g}, this is {SCHEMA_VERSION}: unknown parts are ignored"
        )
    relative = folder.relative_to(root).as_posix()
    run = LoadedRun(
        folder=folder,
        where=folder.name if relative == "." else relative,
        config=config,
        summary=summary,
        status=status,
        environment=reading.record(folder / "environment.json", Environment, notes),
        parameters=reading.parameters(folder, notes),
        metrics=reading.metrics(folder / "metrics.jsonl", notes),
        moments=reading.moments(folder / "moments.parquet", notes),
        predictions=predictions.read(folder / predictions.FILE, notes),
        state="running",
        reason="",
        comparison_key=str(summary.get("comparison_key") or ""),
        notes=notes,
    )
    run.state, run.reason = _state(run)
    if run.state == "finished" and not run.finished:
        notes.append(f"finished without a finite {run.measure.title}: it counts as failed")
        run.state, run.reason = "failed", f"no finite {run.measure.title} at the end"
    return run


def _state(run: LoadedRun) -> tuple[str, str]:
    """Return the state of a run and its reason, from the first file that records them."""
    notes, attempts = run.notes, run.attempts
    restarts = len(attempts) - 1 - len(run.resumed_at)
    if restarts > 0:
        notes.append(
            f"restarted from step 0 {formatting.plural(restarts, 'time')} after an attempt that did not finish"
        )
    last = attempts[-1] if attempts else {}
    state = str(run.summary.get("state") or run.status.get("state") or last.get("state") or "running")
    reason = str(run.summary.get("reason") or last.get("reason") or "")
    if run.status.get("state") == "running" and state in ("interrupted", "failed", "diverged"):
        # The summary is that of the previous attempt.
        return "running", "started again and not finished"
    if state not in STATES:
        notes.append(f"state {state!r} is unknown: it counts as failed")
        return "failed", reason or f"unknown state {state}"
    if not run.summary:
        notes.append("no summary.json: the run is not finished or was killed")
        if state == "finished":
            return "failed", "no summary.json"
        return state, reason or ("not finished, or killed" if state == "running" else "no summary.json")
    if state == "finished" and not (run.folder / "DONE").exists():
        notes.append("finished, but the DONE file is missing")
    return state, reason


def _fill_comparison_keys(runs: list[LoadedRun]) -> None:
    """Give runs without a comparison key the key of runs with an equivalent configuration."""
    known: dict[str, str] = {}
    for run in runs:
        if run.comparison_key and run.config:
            known.setdefault(_fingerprint(run.config), run.comparison_key)
    for run in runs:
        if not run.comparison_key:
            fingerprint = _fingerprint(run.config)
            run.comparison_key = known.get(
                fingerprint, f"config:{fingerprint}" if run.config else f"unknown:{run.where}"
            )
            if fingerprint in known:
                run.notes.append(
                    "compared with runs of the same configuration (it records no comparison key)"
                )


def _fingerprint(config: Mapping[str, Any]) -> str:
    kept = {key: value for key, value in config.items() if key not in NOT_COMPARED}
    return hashlib.sha256(json.dumps(kept, sort_keys=True, default=str).encode()).hexdigest()[:16]
