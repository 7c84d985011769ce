"""The W&B run of a margin job: job type `margin`, the trajectories as scalars of each optimizer."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from analysis.formatting import to_jsonable
from analysis.margin.outputs import Finished, counts
from analysis.margin.plots import shown_runs
from analysis.margin.settings import Settings
from analysis.margin.trajectory import Run
from harness.config.schema import RunConfig
from harness.record.wandb import WandbSink

UNLOGGED = ("pattern",)


def mirror(
    settings: Settings, done: Finished, folder: Path, say: Callable[[str], None], exit_code: int
) -> None:
    """Log the shown runs row by row, then the table; whatever happens to it, the files are there."""
    if settings.wandb_mode == "disabled":
        return
    config = RunConfig.model_validate({"wandb": {"mode": settings.wandb_mode}, "group": settings.group})
    described = {"margin": to_jsonable(asdict(settings))}
    sink = WandbSink(config, folder, uuid.uuid4().hex[:8], {}, say, job_type="margin", described=described)
    for row in _rows(shown_runs(done.runs)):
        sink.write(row)
    figures = {
        f"{row['optimizer']}/{key}": value
        for row in done.table
        for key, value in row.items()
        if key != "optimizer"
    }
    sink.finish(to_jsonable({"sentence": done.headline, "counts": counts(done.runs), **figures}), exit_code)


def _rows(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """One row per recorded state; optimizers side by side. `step` counts rows, since t may exceed any integer."""
    longest = max((len(run.rows) for run in runs), default=0)
    rows: list[dict[str, Any]] = []
    for i in range(longest):
        row: dict[str, Any] = {"step": i}
        for run in runs:
            if i < len(run.rows):
                found = run.rows[i]
                row |= {"t": found.get("t"), "ln_tau": found.get("ln_tau")}
                numbers = {k: v for k, v in found.items() if k not in ("t", "ln_tau", *UNLOGGED)}
                row |= {f"{run.optimizer}/{key}": value for key, value in numbers.items()}
        rows.append(
            {
                key: value
                for key, value in row.items()
                if value == value and value not in (None, float("-inf"))
            }
        )
    return rows
