"""Summarize the logs of track 3 as numbers of each run, from which every figure of docs/RESULTS.md follows.

All runs of a file with several are taken. The summary names each file with its SHA-256, so that somebody who has the
logs can check it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from analysis.comparison import track3
from analysis.runs.logs import loading
from analysis.runs.logs.loading import Entry, LogFinding

SCHEMA_VERSION = 2
SHARES = (0.25, 0.5, 0.75)
"""Parts of a run, of its own last step, near which its loss is recorded."""
NEAR = 0.05
"""Farthest that an evaluation is from such a part, as a share of the last step."""
STEPS = (750, 1500, 2250)
"""Steps at which the losses of runs of different lengths are recorded."""
Floats = NDArray[np.float64]


def summarize(folder: Path) -> dict[str, Any]:
    """Return the summary of the logs below ``folder`` as JSON data.

    Raises:
        InputError: no such folder.
    """
    remarks: list[str] = []
    findings: list[LogFinding] = []
    pairs = loading.entries(folder, "track3", remarks, findings, every_run=True)
    files = {entry.where.split(" (")[0]: entry.log.provenance.sha256 for entry, _ in pairs}
    arms: dict[str, list[Entry]] = {}
    for entry, _ in pairs:
        if entry.copy_of is None:
            arms.setdefault(_label(entry), []).append(entry)
    return {
        "schema_version": SCHEMA_VERSION,
        "source": "KellerJordan/modded-nanogpt, records/track_3_optimization/results (MIT)",
        "model": "GPT of 124 M parameters, FineWeb, 524,288 tokens a step",
        "shares": list(SHARES),
        "steps": list(STEPS),
        "files": files,
        "runs": len(pairs),
        "copies": sum(entry.copy_of is not None for entry, _ in pairs),
        "folders": len({entry.arm for entry, _ in pairs}),
        "findings": [{"code": finding.code, "message": finding.message} for finding in findings],
        "remarks": remarks,
        "arms": [_arm(label, members) for label, members in arms.items()],
    }


def _label(entry: Entry) -> str:
    if not entry.options:
        return entry.arm
    return f"{entry.arm} ({', '.join(f'{key}={value}' for key, value in entry.options.items())})"


def _arm(label: str, members: list[Entry]) -> dict[str, Any]:
    curves = [_curve(entry) for entry in members]
    passing = track3.first_passing_step(curves)
    last = max(entry.log.last_step for entry in members)
    near = [_nearest([steps for steps, _ in curves], share, last) for share in SHARES]
    return {
        "arm": label,
        "last_step": int(last),
        "first_passing_step": None if math.isnan(passing) else int(passing),
        "diverged": sum(entry.log.diverged for entry in members),
        "share_steps": [None if math.isnan(step) else int(step) for step in near],
        "runs": [
            {
                "file": entry.where,
                "final": None if entry.log.diverged else float(losses[-1]),
                "at_share": [_rounded(_at(steps, losses, step)) for step in near],
                "at_step": [_rounded(_at(steps, losses, step)) for step in STEPS],
                "reaches_target": _rounded(_reaches(steps, losses), 1),
            }
            for entry, (steps, losses) in zip(members, curves, strict=True)
        ],
    }


def _curve(entry: Entry) -> tuple[Floats, Floats]:
    """Return the steps with a finite loss and these losses; empty for a run that never had one."""
    losses = entry.log.columns["val/loss"]
    finite = np.isfinite(losses)
    return entry.log.columns["step"][finite], losses[finite]


def _at(steps: Floats, losses: Floats, step: float) -> float:
    """Return the loss of the evaluation at a step; NaN without one.

    A loss between two evaluations is not interpolated: the mean of two varies less than either.
    """
    found = np.flatnonzero(steps == step)
    return float(losses[found[0]]) if len(found) else math.nan


def _nearest(steps: Sequence[Floats], share: float, last: float) -> float:
    """Return the step nearest to a share of the run at which all runs of an arm were evaluated; NaN if none is near.

    Runs without a finite loss have no part in it.
    """
    known = [own for own in steps if len(own)]
    common = reduce(np.intersect1d, known) if known else np.empty(0)
    distance = np.abs(common - share * last)
    if not len(common) or distance.min() > NEAR * last:
        return math.nan
    return float(common[np.argmin(distance)])


def _reaches(steps: Floats, losses: Floats) -> float:
    """Return the step at which the loss first is at the target, interpolated linearly; NaN if never or not known."""
    below = np.flatnonzero(losses <= track3.TARGET)
    if not len(below) or below[0] == 0:
        return math.nan
    i = int(below[0])
    share = (losses[i - 1] - track3.TARGET) / (losses[i - 1] - losses[i])
    return float(steps[i - 1] + share * (steps[i] - steps[i - 1]))


def _rounded(value: float, digits: int = 5) -> float | None:
    return round(value, digits) if math.isfinite(value) else None
