"""All runs below a folder. The format of a run folder is described in `harness.record.schema`.

What another trainer left is read from the same files (`metrics.jsonl` and a `summary.json` are enough), or from
CSV and JSONL tables (`foreign`); docs/report.md describes both.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from analysis import formatting
from analysis.runs import external, reading
from analysis.runs.reading import number
from analysis.runs.run import Run
from harness.errors import InputError
from harness.record.folder import JOBS
from harness.record.readers import Environment, Status, Summary
from harness.record.schema import SCHEMA_VERSION, STATES

# What may differ between two runs whose losses are compared: the arm, the seed, and what changes no loss.
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


def load(folder: str | Path, remarks: list[str] | None = None) -> list[Run]:
    """All runs below ``folder`` (or ``folder`` itself), in the order of their paths; none is no error.

    Args:
        folder: where to look.
        remarks: gets a line for each table that looks like runs of another trainer and is none, and for each folder
            that can't be listed.

    Raises:
        InputError: the folder does not exist.
    """
    root = Path(folder)
    if not root.is_dir():
        raise InputError("report", folder, "is not a folder", fix="optbench report runs/GROUP")
    runs: list[Run] = []
    remarks = [] if remarks is None else remarks
    for path in sorted(_sources(root, remarks)):
        if path.is_dir():
            runs.append(_read(path, root))
        else:
            runs.extend(external.read(path, root, remarks))
    _adopt_keys(runs)
    return runs


def _sources(root: Path, remarks: list[str]) -> Iterator[Path]:
    """Run folders, and tables that lie outside of them."""

    def note(error: OSError) -> None:
        remarks.append(f"{error.filename} can't be listed ({error.strerror})")

    for directory, below, files in os.walk(root, onerror=note):
        if any(mark in files for mark in _MARKS):
            below.clear()
            yield Path(directory)
            continue
        # A run that was replaced is moved aside under a name with a dot.
        below[:] = sorted(name for name in below if not name.startswith(".") and name != JOBS)
        yield from (Path(directory, name) for name in files if external.may_be(name))


def _read(folder: Path, root: Path) -> Run:
    notes: list[str] = []
    config = reading.mapping(folder / "config.yaml", notes, required=True)
    summary = reading.record(folder / "summary.json", Summary, notes)
    status = reading.record(folder / "status.json", Status, notes)
    version = number(summary.get("schema_version", status.get("schema_version")))
    if version < SCHEMA_VERSION:
        notes.append(f"written by schema {version:g}, this is {SCHEMA_VERSION}: what it lacks is left blank")
    elif version > SCHEMA_VERSION:
        notes.append(
            f"written by the newer schema {version:g}, this is {SCHEMA_VERSION}: unknown parts are left out"
        )
    relative = folder.relative_to(root).as_posix()
    run = Run(
        folder=folder,
        where=folder.name if relative == "." else relative,
        config=config,
        summary=summary,
        status=status,
        environment=reading.record(folder / "environment.json", Environment, notes),
        parameters=reading.rows(folder, notes),
        metrics=reading.metrics(folder / "metrics.jsonl", notes),
        moments=reading.moments(folder / "moments.parquet", notes),
        state="running",
        reason="",
        comparison_key=str(summary.get("comparison_key") or ""),
        notes=notes,
    )
    run.state, run.reason = _state(run)
    if run.state == "finished" and not run.finished:
        notes.append("finished without a finite validation loss: it counts as failed")
        run.state, run.reason = "failed", "no finite validation loss at the end"
    return run


def _state(run: Run) -> tuple[str, str]:
    """What became of the run, and why, from whichever file tells."""
    notes, attempts = run.notes, run.attempts
    again = len(attempts) - 1 - len(run.resumed_at)
    if again > 0:
        notes.append(f"begun anew {formatting.plural(again, 'time')} after an attempt that did not finish")
    last = attempts[-1] if attempts else {}
    state = str(run.summary.get("state") or run.status.get("state") or last.get("state") or "running")
    reason = str(run.summary.get("reason") or last.get("reason") or "")
    if run.status.get("state") == "running" and state in ("interrupted", "failed", "diverged"):
        return "running", "begun again, and not over"  # the summary is that of the attempt before
    if state not in STATES:
        notes.append(f"state {state!r} is unknown: it counts as failed")
        return "failed", reason or f"unknown state {state}"
    if not run.summary:
        notes.append("no summary.json: the run is not over, or was killed")
        if state == "finished":
            return "failed", "no summary.json"
        return state, reason or ("not over, or killed" if state == "running" else "no summary.json")
    if state == "finished" and not (run.folder / "DONE").exists():
        notes.append("finished, but the DONE file is missing")
    return state, reason


def _adopt_keys(runs: list[Run]) -> None:
    """Give a run without a comparison key the key of the runs whose configuration agrees where it matters."""
    known: dict[str, str] = {}
    for run in runs:
        if run.comparison_key and run.config:
            known.setdefault(_fingerprint(run.config), run.comparison_key)
    for run in runs:
        if not run.comparison_key:
            print_ = _fingerprint(run.config)
            run.comparison_key = known.get(
                print_, f"config:{print_}" if run.config else f"unknown:{run.where}"
            )
            if print_ in known:
                run.notes.append(
                    "placed beside runs of the same configuration (it records no comparison key)"
                )


def _fingerprint(config: Mapping[str, Any]) -> str:
    kept = {key: value for key, value in config.items() if key not in NOT_COMPARED}
    return hashlib.sha256(json.dumps(kept, sort_keys=True, default=str).encode()).hexdigest()[:16]
