"""Read the console output of nanochat's base training.

``Step 00250 | Validation bpb: 0.9012`` is an evaluation, in bits per byte; ``step 00250/21400 (1.17%) | loss: 3.4 | …
| tok/sec: 1,050,000 | … | total time: 12.34m`` is a step with its smoothed training loss (nats/token). Bits per byte
are not converted to nats per token: that takes the bytes per token, which a log does not state.
"""

from __future__ import annotations

import math
import re

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
    """Return the run of one log; empty if no line of it is a step or an evaluation."""
    rows: dict[float, dict[str, float]] = {}
    planned, batch, notes = math.nan, math.nan, []
    for number, line in enumerate(text.splitlines(), 1):
        if evaluation := _EVALUATION.match(line):
            rows.setdefault(float(evaluation[1]), {})["val/bits_per_byte"] = float(evaluation[2])
        elif step := _STEP.match(line):
            planned = float(step[2])
            row = rows.setdefault(float(step[1]), {})
            row["train/loss"] = float(step[3])
            if seconds := _SECONDS.search(line):
                row["wall_s"] = 60 * float(seconds[1])
            if throughput := _THROUGHPUT.search(line):
                row["throughput/tokens_per_s"] = float(throughput[1].replace(",", ""))
        elif total := _BATCH.match(line):
            batch = float(total[1].replace(",", ""))
        elif _BEGINS.match(line):
            notes.append(f"line {number} is not read: {line[:60]!r}")
    if not rows:
        return []
    settings = {"steps_planned": planned}
    if math.isfinite(batch):
        settings["batch_tokens"] = batch
        for step, row in rows.items():
            row["tokens"] = step * batch
    bits = [row["val/bits_per_byte"] for _, row in sorted(rows.items()) if "val/bits_per_byte" in row]
    diverged = bool(bits) and not math.isfinite(bits[-1])
    return [LogRun(to_columns(rows), provenance, settings, planned, diverged=diverged, notes=tuple(notes))]
