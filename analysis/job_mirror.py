"""The mirror in W&B of a job that is not a training run: `optbench margin`, `optbench reconstruct`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from harness.config.schema import RunConfig
from harness.record.wandb import WandbSink


def mirror(
    *,
    job_type: str,
    wandb: Mapping[str, Any],
    group: str,
    run_id: str,
    folder: Path,
    keys: Mapping[str, Any],
    rows: Iterable[Mapping[str, Any]],
    summary: Mapping[str, Any],
    exit_code: int,
    say: Callable[[str], None],
    facts: Mapping[str, Any] | None = None,
    attach: Callable[[Any], object] | None = None,
) -> None:
    """Log a finished job to W&B; if that fails, the folder has everything already.

    Args:
        job_type: of the W&B run.
        wandb: the keys `wandb.*`; nothing is logged with mode=disabled.
        group: of the W&B run.
        run_id: of the W&B run.
        folder: of the job, where an offline run is written.
        keys: what the job was asked for, as config of the W&B run.
        rows: figures in the order of their `step`.
        summary: figures of the whole job.
        exit_code: of the command.
        say: takes lines for people.
        facts: further entries of the W&B config.
        attach: logs tables, images and artifacts to the W&B run that it is given.
    """
    if wandb["mode"] == "disabled":
        return
    config = RunConfig.model_validate({"wandb": dict(wandb), "group": group})
    sink = WandbSink(config, folder, run_id, dict(facts or {}), say, job_type=job_type, described=dict(keys))
    for row in rows:
        sink.write(dict(row))
    if attach is not None:
        sink.attach(attach)
    sink.finish(summary, exit_code)
