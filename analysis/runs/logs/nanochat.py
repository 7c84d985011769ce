"""Read the console output of nanochat's base training.

``Step 00250 | Validation bpb: 0.9012`` is an evaluation, in bits per byte; ``step 00250/21400 (1.17%) | loss: 3.4 | …
| tok/sec: 1,050,000 | … | total time: 12.34m`` is a step with its smoothed training loss (nats/token). Bits per byte
are not converted to nats per token: that takes the bytes per token, which a log does not state.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field

from analysis.runs.logs.log_run import LogRun, Provenance
from analysis.runs.logs.track3 import NUMBER
from analysis.runs.reading import to_columns

_EVALUATION = re.compile(rf"^Step (\d+) \| Validation bpb: ({NUMBER})(?=\s|$)", re.IGNORECASE)
_STEP = re.compile(rf"^step (\d+)/(\d+) \([\d.]+%\) \| loss: ({NUMBER}) \|", re.IGNORECASE)
_SECONDS = re.compile(rf"\| total time: ({NUMBER})m", re.IGNORECASE)
_THROUGHPUT = re.compile(r"\| tok/sec: ([\d,]+)")
_BATCH = re.compile(r"^Total batch size ([\d,]+)")
_BEGINS = re.compile(r"^(?:Step \d+ \| Validation bpb|step \d+/\d+ \()")


def read(text: str, provenance: Provenance) -> list[LogRun]:
    """Return the runs of one log; empty if no line of it is a step or an evaluation.

    A step 0 after later ones begins another run. Other steps that come again are those of a run that was resumed: the
    later row counts.
    """
    runs: list[_Run] = []
    batch, notes = math.nan, []
    for number, line in enumerate(text.splitlines(), 1):
        if evaluation := _EVALUATION.match(line):
            row = _row(runs, float(evaluation[1]), batch, notes)
            row["val/bits_per_byte"] = float(evaluation[2])
        elif step := _STEP.match(line):
            row = _row(runs, float(step[1]), batch, notes)
            runs[-1].planned = float(step[2])
            row["train/loss"] = float(step[3])
            if seconds := _SECONDS.search(line):
                row["wall_s"] = 60 * float(seconds[1])
            if throughput := _THROUGHPUT.search(line):
                row["throughput/tokens_per_s"] = float(throughput[1].replace(",", ""))
        elif total := _BATCH.match(line):
            batch = float(total[1].replace(",", ""))
        elif _BEGINS.match(line):
            (runs[-1].notes if runs else notes).append(f"line {number} is not read: {line[:60]!r}")
    return [run.as_log(provenance) for run in runs]


@dataclass
class _Run:
    """A run whose lines are being read."""

    batch: float
    notes: list[str]
    rows: dict[float, dict[str, float]] = field(default_factory=dict)
    planned: float = math.nan
    last: float = -1.0

    def as_log(self, provenance: Provenance) -> LogRun:
        settings = {"steps_planned": self.planned}
        if math.isfinite(self.batch):
            settings["batch_tokens"] = self.batch
            for step, row in self.rows.items():
                row["tokens"] = step * self.batch
        bits = [
            row["val/bits_per_byte"] for _, row in sorted(self.rows.items()) if "val/bits_per_byte" in row
        ]
        return LogRun(
            to_columns(self.rows),
            provenance,
            settings,
            self.planned,
            diverged=bool(bits) and not math.isfinite(bits[-1]),
            notes=tuple(self.notes),
        )


def _row(runs: list[_Run], step: float, batch: float, notes: list[str]) -> dict[str, float]:
    """Return the row of a step of the run that the log is in."""
    if not runs or (step == 0 and runs[-1].last > 0):
        runs.append(_Run(batch, [] if runs else notes))
    run = runs[-1]
    if step < run.last:
        run.notes.append(
            f"the run goes on from step {step:g} after step {run.last:g}; the later rows are used"
        )
    run.last = step
    return run.rows.setdefault(step, {})
