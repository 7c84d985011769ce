"""Runs below a folder, as the comparison needs them. The format is described in `harness.record.schema`.

What another trainer leaves is read the same way: `metrics.jsonl` and a `summary.json` with `optimizer`,
`seed`, `comparison_key` and `state` are enough (docs/report.md).
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from analysis.compare import reading
from analysis.compare.reading import Columns, number
from harness.config.errors import InputError
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


@dataclass
class Run:
    """One run folder, read. Absent files leave empty containers; every oddity is a line of ``notes``."""

    folder: Path
    """The run folder."""
    where: str
    """Its path relative to the folder that was loaded."""
    config: dict[str, Any]
    summary: dict[str, Any]
    status: dict[str, Any]
    environment: dict[str, Any]
    parameters: list[dict[str, Any]]
    metrics: Columns
    """Metric key → float64 array, one entry per logged step; NaN where a row lacks the key."""
    moments: pd.DataFrame
    state: str
    """One of `harness.record.schema.STATES`; ``running`` also if the run was killed without a word."""
    reason: str
    comparison_key: str
    """Runs that share it have equal data, model, budget and precision."""
    notes: list[str] = field(default_factory=list)

    @property
    def optimizer(self) -> str:
        """Preset or plug-in name."""
        return str(self.summary.get("optimizer") or self.optimizer_config.get("name") or "unknown")

    @property
    def optimizer_config(self) -> dict[str, Any]:
        """Name, learning rate and options, as resolved, without what makes no other arm.

        That is what is only said about them, and the seed of their random draws where it follows the run's.
        """
        found = self.config.get("optimizer")
        if not isinstance(found, dict):
            return {}
        skipped = {"lr_source", "lr_tuned"}
        if found.get("seed") == self.config.get("seed"):
            skipped.add("seed")
        return {key: value for key, value in found.items() if key not in skipped}

    @property
    def seed(self) -> int:
        """Seed; −1 where none is recorded."""
        value = number(self.summary.get("seed", self.config.get("seed")))
        return -1 if math.isnan(value) else int(value)

    @property
    def final_loss(self) -> float:
        """Validation loss at the last step (nats/token); NaN unless the run finished with a finite one."""
        loss = number(self.summary.get("val/loss"))
        return loss if self.state == "finished" and math.isfinite(loss) else math.nan

    @property
    def finished(self) -> bool:
        """Reached its last step with a finite validation loss."""
        return math.isfinite(self.final_loss)

    @property
    def steps(self) -> float:
        """Steps done."""
        recorded = number(self.summary.get("steps", self.status.get("step")))
        logged = self.metrics.get("step")
        return float(logged[-1]) if math.isnan(recorded) and logged is not None else recorded

    @property
    def certificate(self) -> str:
        """What is known of its optimizer on its engine (`optbench certify`), in words; empty if not recorded."""
        found = self.environment.get("certificate")
        if not isinstance(found, dict):
            return ""
        if found.get("passed") is None:
            return f"none: {found.get('reason', 'uncertified cell')}"
        if not found["passed"]:
            return "failed"
        error = number(found.get("replay_error"))
        words = ["passed"] + ([f"replay error {error:.1e}"] if math.isfinite(error) else [])
        if found.get("current") is False:
            words.append("of other sources")
        return ", ".join(words)

    def fact(self, key: str, part: str | None = None) -> float:
        """A number of the summary, or of a table in it (``fact("time_s", "optimizer")``); NaN if absent."""
        value = self.summary.get(key)
        if part is not None:
            value = value.get(part) if isinstance(value, dict) else None
        return number(value)

    def time(self, part: str) -> float:
        """Seconds per step spent in ``part``: mean over all steps but those of the first row; NaN if
        unmeasured.

        The mean, not a median over rows: an update that is dear every 200th step pays for it here.
        """
        values, steps = self.metrics.get(f"time/{part}_s"), self.metrics.get("step")
        if values is None or steps is None or len(steps) < 2:
            return self.fact("time_s", part)
        weights = np.diff(steps)
        kept = np.isfinite(values[1:])
        if not kept.any():
            return self.fact("time_s", part)
        return float(np.average(values[1:][kept], weights=weights[kept]))

    def text(self, key: str) -> str:
        """A word of the summary, else of the configuration; empty if absent."""
        value = self.summary.get(key)
        return "" if value is None else str(value)


def load(folder: str | Path) -> list[Run]:
    """All runs below ``folder`` (or ``folder`` itself), in the order of their paths.

    Raises:
        InputError: the folder does not exist or no run lies below it.
    """
    root = Path(folder)
    if not root.is_dir():
        raise InputError("report", folder, "is not a folder", fix="optbench report runs/GROUP")
    runs = [_read(path, root) for path in sorted(_run_folders(root))]
    if not runs:
        raise InputError(
            "report", folder, "holds no runs", allowed="a folder of run folders", fix="optbench report runs"
        )
    _adopt_keys(runs)
    return runs


def _run_folders(root: Path) -> Iterator[Path]:
    for directory, below, files in os.walk(root):
        if any(mark in files for mark in _MARKS):
            below.clear()
            yield Path(directory)
        else:
            # A run that was replaced is moved aside under a name with a dot.
            below[:] = sorted(name for name in below if not name.startswith("."))


def _read(folder: Path, root: Path) -> Run:
    notes: list[str] = []
    config = reading.mapping(folder / "config.yaml", notes, required=True)
    summary = reading.mapping(folder / "summary.json", notes)
    status = reading.mapping(folder / "status.json", notes)
    version = number(summary.get("schema_version", status.get("schema_version")))
    if version < SCHEMA_VERSION:
        notes.append(f"written by schema {version:g}, this is {SCHEMA_VERSION}: what it lacks is left blank")
    elif version > SCHEMA_VERSION:
        notes.append(
            f"written by the newer schema {version:g}, this is {SCHEMA_VERSION}: unknown parts are left out"
        )
    state, reason = _state(folder, summary, status, notes)
    relative = folder.relative_to(root).as_posix()
    run = Run(
        folder=folder,
        where=folder.name if relative == "." else relative,
        config=config,
        summary=summary,
        status=status,
        environment=reading.mapping(folder / "environment.json", notes),
        parameters=reading.rows(folder / "parameters.json", notes),
        metrics=reading.metrics(folder / "metrics.jsonl", notes),
        moments=reading.moments(folder / "moments.parquet", notes),
        state=state,
        reason=reason,
        comparison_key=str(summary.get("comparison_key") or ""),
        notes=notes,
    )
    if state == "finished" and not run.finished:
        notes.append("finished without a finite validation loss: it counts as failed")
        run.state, run.reason = "failed", "no finite validation loss at the end"
    return run


def _state(
    folder: Path, summary: Mapping[str, Any], status: Mapping[str, Any], notes: list[str]
) -> tuple[str, str]:
    """What became of the run, and why, from whichever file tells."""
    attempts = status.get("attempts")
    attempts = [a for a in attempts if isinstance(a, dict)] if isinstance(attempts, list) else []
    if len(attempts) > 1:
        notes.append(f"resumed: {len(attempts)} attempts")
    last = attempts[-1] if attempts else {}
    state = str(summary.get("state") or status.get("state") or last.get("state") or "running")
    reason = str(summary.get("reason") or last.get("reason") or "")
    if state not in STATES:
        notes.append(f"state {state!r} is unknown: it counts as failed")
        return "failed", reason or f"unknown state {state}"
    if not summary:
        notes.append("no summary.json: the run is not over, or was killed")
        if state == "finished":
            return "failed", "no summary.json"
        return state, reason or f"no summary; last state: {state}"
    if state == "finished" and not (folder / "DONE").exists():
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
    return json.dumps(kept, sort_keys=True, default=str)
