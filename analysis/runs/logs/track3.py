"""Read text logs of modded-nanogpt's track 3: ``step:A/B val_loss:X train_time:Ts step_avg:Yms``.

Other text, such as the source that these logs embed, is passed over. Words after ``step_avg`` are ignored. A step that
does not rise begins another run: some published files hold the runs of all seeds one after the other.
"""

from __future__ import annotations

import math
import re

from analysis.runs.logs.log_run import LogRun, Provenance
from analysis.runs.reading import to_columns

BATCH_TOKENS = 524_288
"""Tokens of a step, 8 × 64 × 1024, which the rules of the benchmark fix."""
NUMBER = r"[-+]?(?:\d+\.?\d*(?:e[-+]?\d+)?|\.\d+(?:e[-+]?\d+)?|inf|nan)"
_ROW = re.compile(
    rf"^step:(\d+)/(\d+) val_loss:({NUMBER})(?: train_time:({NUMBER})(ms|s))?(?=\s|$)", re.IGNORECASE
)
_BEGINS = re.compile(r"^step:\d+/\d+ val_loss")


def read(text: str, provenance: Provenance) -> list[LogRun]:
    """Return the runs of one log."""
    runs: list[tuple[dict[float, dict[str, float]], float, list[str]]] = []
    pending: list[str] = []
    for number, line in enumerate(text.splitlines(), 1):
        match = _ROW.match(line)
        if match is None:
            if _BEGINS.match(line):
                note = f"line {number} is not read: {line[:60]!r}"
                (runs[-1][2] if runs else pending).append(note)
            continue
        step, planned = float(match[1]), float(match[2])
        if not runs or step <= max(runs[-1][0]) or planned != runs[-1][1]:
            runs.append(({}, planned, pending))
            pending = []
        row = {"val/loss": float(match[3]), "tokens": step * BATCH_TOKENS}
        if match[4] is not None:
            row["wall_s"] = float(match[4]) / (1000 if match[5].lower() == "ms" else 1)
        runs[-1][0][step] = row
    return [
        LogRun(
            to_columns(rows),
            provenance,
            {"steps_planned": planned},
            planned,
            diverged=not math.isfinite(rows[max(rows)]["val/loss"]),
            notes=tuple(notes),
        )
        for rows, planned, notes in runs
    ]
