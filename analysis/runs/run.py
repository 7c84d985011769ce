"""One run, as the comparison needs it. `loading` reads it from its folder, `foreign` from a table."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from analysis.runs.reading import Columns, number

if TYPE_CHECKING:
    from analysis.runs.tuning_ledger import Tuned


@dataclass
class Run:
    """One run, read. Absent files leave empty containers; every oddity is a line of ``notes``."""

    folder: Path
    """The run folder, or the table that holds a run of another trainer."""
    where: str
    """Its path relative to the folder that was loaded; for a table with what picks the run out of it."""
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
    foreign: bool = False
    """Read from a table of another trainer: what it says of data and budget is not checked."""
    tuning: Tuned | None = None
    """The study that chose this run's setting (`tuning_ledger.adopt`); None: no study did."""

    @property
    def attempts(self) -> list[dict[str, Any]]:
        """What status.json tells of each attempt."""
        found = self.status.get("attempts")
        return [entry for entry in found if isinstance(entry, dict)] if isinstance(found, list) else []

    @property
    def resumed_at(self) -> list[int]:
        """Steps from which later attempts went on; an attempt that began anew has none."""
        steps = [number(attempt.get("first_step")) for attempt in self.attempts[1:]]
        return [int(step) for step in steps if math.isfinite(step) and step > 0]

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
        return int(value) if math.isfinite(value) else -1

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
        """Steps done; NaN where nothing tells."""
        recorded = number(self.summary.get("steps", self.status.get("step")))
        logged = self.metrics.get("step")
        return float(logged[-1]) if math.isnan(recorded) and logged is not None else recorded

    @property
    def certificate(self) -> str:
        """What is known of its optimizer on its engine (`optbench certify`), in words; empty if not recorded."""
        found = self.certified
        if found is None:
            return ""
        if found.get("passed") is None:
            return f"none: {found.get('reason', 'uncertified cell')}"
        if not found["passed"]:
            return "failed"
        error = self.replay_error
        words = ["passed"] + ([f"replay error {error:.1e}"] if math.isfinite(error) else [])
        if found.get("current") is False:
            words.append("of other sources")
        return ", ".join(words)

    @property
    def certified(self) -> dict[str, Any] | None:
        """The certificate as the run recorded it (`harness.verify.certificates.of_run`); None if it did not."""
        found = self.environment.get("certificate")
        return found if isinstance(found, dict) else None

    @property
    def replay_error(self) -> float:
        """Replay error of its certificate; NaN without one."""
        return number((self.certified or {}).get("replay_error"))

    @property
    def commit(self) -> str:
        """Git commit of the code; empty if not recorded."""
        found = self.environment.get("git")
        commit = found.get("commit") if isinstance(found, dict) else None
        return commit if isinstance(commit, str) else ""

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
