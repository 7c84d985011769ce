"""One run as analysis reads it: `loading` reads it from a run folder, `external` from a table."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from analysis.runs.measure import LOSS, Measure, final_value, measure_of
from analysis.runs.predictions import Predictions
from analysis.runs.reading import Columns, number

if TYPE_CHECKING:
    from analysis.runs.tuning_ledger import TunedArm


@dataclass
class LoadedRun:
    """A run read from files. Absent files leave empty containers; each problem adds a line to ``notes``."""

    folder: Path
    """The run folder, or the table that holds an external run."""
    where: str
    """Path relative to the loaded folder; for a table also the optimizer and seed of the run."""
    config: dict[str, Any]
    summary: dict[str, Any]
    status: dict[str, Any]
    environment: dict[str, Any]
    parameters: list[dict[str, Any]]
    metrics: Columns
    """Metric key → float64 array, one entry per logged step; NaN where a row lacks the key."""
    moments: pd.DataFrame
    state: str
    """One of `harness.record.schema.STATES`; ``running`` also if the run was killed before it recorded its end."""
    reason: str
    comparison_key: str
    """Runs that share it have equal data, model, budget and precision."""
    notes: list[str] = field(default_factory=list)
    is_external: bool = False
    """Read from a table of another trainer; what it states about data and budget is not checked."""
    has_seed: bool = True
    """False where ``seed`` is only the run's number, by which runs of two arms cannot be paired."""
    unstated: str = ""
    """What of model and data an external log does not state, so that its results cannot be compared; else empty."""
    predictions: Predictions | None = None
    """Per-example results of the last evaluation; None without them."""
    tuning: TunedArm | None = None
    """The tuning study that selected this run's setting (`tuning_ledger.attach`); None without one."""

    @property
    def attempts(self) -> list[dict[str, Any]]:
        """Attempts as status.json records them."""
        attempts = self.status.get("attempts")
        return [entry for entry in attempts if isinstance(entry, dict)] if isinstance(attempts, list) else []

    @property
    def resumed_at(self) -> list[int]:
        """Steps at which later attempts resumed; an attempt that restarted from step 0 has none."""
        steps = [number(attempt.get("first_step")) for attempt in self.attempts[1:]]
        return [int(step) for step in steps if math.isfinite(step) and step > 0]

    @property
    def optimizer(self) -> str:
        """Preset or plug-in name."""
        return str(self.summary.get("optimizer") or self.optimizer_config.get("name") or "unknown")

    @property
    def optimizer_config(self) -> dict[str, Any]:
        """Resolved optimizer options that define an arm, without provenance notes and the run's own seed."""
        options = self.config.get("optimizer")
        if not isinstance(options, dict):
            return {}
        skipped = {"lr_source", "lr_tuned"}
        # A seed of the optimizer that differs from the run's is an option that somebody set.
        if options.get("seed") == self.config.get("seed"):
            skipped.add("seed")
        return {key: value for key, value in options.items() if key not in skipped}

    @property
    def seed(self) -> int:
        """Seed of the run; −1 if none is recorded."""
        value = number(self.summary.get("seed", self.config.get("seed")))
        return int(value) if math.isfinite(value) else -1

    @property
    def final_loss(self) -> float:
        """Validation loss at the last step (nats/token); NaN unless the run finished with a finite one."""
        return self.final(LOSS)

    @property
    def measure(self) -> Measure:
        """What this run is compared by: its task's metric, else the validation loss."""
        return measure_of(self.config, self.summary)

    def final(self, measure: Measure) -> float:
        """Return a measure at the last step; NaN unless the run finished with a finite one."""
        value = final_value(measure, self.summary)
        return value if self.state == "finished" and math.isfinite(value) else math.nan

    @property
    def finished(self) -> bool:
        """True if the run reached its last step with a finite value of what it is compared by."""
        return math.isfinite(self.final(self.measure))

    @property
    def steps(self) -> float:
        """Number of steps done; NaN if it is not recorded."""
        recorded = number(self.summary.get("steps", self.status.get("step")))
        logged = self.metrics.get("step")
        return float(logged[-1]) if math.isnan(recorded) and logged is not None else recorded

    @property
    def certificate(self) -> str:
        """Certificate of the optimizer on the run's engine (`optbench certify`) as text; empty if not recorded."""
        certificate = self.certified
        if certificate is None:
            return ""
        if certificate.get("passed") is None:
            return f"none: {certificate.get('reason', 'uncertified cell')}"
        if not certificate["passed"]:
            return "failed"
        error = self.replay_error
        parts = ["passed"] + ([f"replay error {error:.1e}"] if math.isfinite(error) else [])
        if certificate.get("current") is False:
            parts.append("of other sources")
        return ", ".join(parts)

    @property
    def certified(self) -> dict[str, Any] | None:
        """Certificate as the run recorded it (`harness.record.certificates.of_run`); None if it recorded none."""
        certificate = self.environment.get("certificate")
        return certificate if isinstance(certificate, dict) else None

    @property
    def replay_error(self) -> float:
        """Replay error of the certificate; NaN without one."""
        return number((self.certified or {}).get("replay_error"))

    @property
    def commit(self) -> str:
        """Git commit of the code; empty if not recorded."""
        git = self.environment.get("git")
        commit = git.get("commit") if isinstance(git, dict) else None
        return commit if isinstance(commit, str) else ""

    def fact(self, key: str, part: str | None = None) -> float:
        """Return a number of the summary, or of a table in it (``fact("time_s", "optimizer")``); NaN if absent."""
        value = self.summary.get(key)
        if part is not None:
            value = value.get(part) if isinstance(value, dict) else None
        return number(value)

    def time(self, part: str) -> float:
        """Return seconds per step spent in ``part``, averaged over all rows but the first; NaN if not measured."""
        values, steps = self.metrics.get(f"time/{part}_s"), self.metrics.get("step")
        if values is None or steps is None or len(steps) < 2:
            return self.fact("time_s", part)
        # The mean, not a median: it includes updates that are expensive at every 200th step only.
        weights = np.diff(steps)
        kept = np.isfinite(values[1:])
        if not kept.any():
            return self.fact("time_s", part)
        return float(np.average(values[1:][kept], weights=weights[kept]))

    def text(self, key: str) -> str:
        """Return a text of the summary; empty if absent."""
        value = self.summary.get(key)
        return "" if value is None else str(value)
