"""The W&B run of a job: job type `reconstruction`, tables, images, artifacts of victims, candidates, alternatives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from analysis.reconstruction.job import Results
from harness.config.schema import RunConfig
from harness.record.wandb import WandbSink

ARTIFACTS = {"victims": "model", "candidates": "candidates", "alternatives": "alternatives"}
_PLACES = {"out", "overwrite", "data_path", "checkpoint", "batch"}


def mirror(results: Results, pictures: Sequence[Path], say: Callable[[str], None], exit_code: int) -> None:
    """Log everything; whatever happens to it, the folder has it already."""
    keys = results.config.wandb
    if keys.mode == "disabled":
        return
    config = RunConfig.model_validate({"wandb": keys.model_dump(), "group": "reconstruction"})
    name = f"{results.config.mode}-{results.config.identity}"
    sink = WandbSink(
        config,
        results.folder.path,
        name,
        {"identity": results.config.identity},
        say,
        job_type="reconstruction",
        described=_described(results),
    )
    for row in _over_steps(results):
        sink.write(row)
    sink.attach(lambda run: _attach(run, results, pictures, name))
    sink.finish({"controls_failed": results.controls_failed, "exact_passed": results.exact_passed}, exit_code)


def _described(results: Results) -> dict[str, Any]:
    return results.config.model_dump(mode="json", exclude=_PLACES)


def _over_steps(results: Results) -> list[dict[str, Any]]:
    """Certificates as curves over training steps: optimizer/seed/figure."""
    rows: dict[int, dict[str, Any]] = {}
    for row in results.tables["certificate"]:
        at = rows.setdefault(row["step"], {"step": row["step"]})
        start = f"{row['optimizer']}/seed{row['seed']}"
        at |= {
            f"{start}/{key}": v
            for key, v in row.items()
            if isinstance(v, int | float) and key not in ("seed", "step")
        }
    return [rows[step] for step in sorted(rows)]


def _attach(run: Any, results: Results, pictures: Sequence[Path], name: str) -> None:
    import wandb

    tables = {key: wandb.Table(dataframe=pd.DataFrame(rows)) for key, rows in results.tables.items() if rows}
    images = {f"images/{path.stem}": wandb.Image(str(path)) for path in pictures}
    run.log({**tables, **images})
    for folder, kind in ARTIFACTS.items():
        files = sorted((results.folder.path / folder).glob("*"))
        if files:
            artifact = wandb.Artifact(f"{name}-{folder}", type=kind)
            for path in files:
                artifact.add_file(str(path))
            run.log_artifact(artifact)
    artifact = wandb.Artifact(f"{name}-config", type="config")
    # Not the folder's own file: that one names places on this machine.
    with artifact.new_file("config.yaml") as file:
        file.write(yaml.safe_dump(_described(results), sort_keys=False, allow_unicode=True))
    run.log_artifact(artifact)
