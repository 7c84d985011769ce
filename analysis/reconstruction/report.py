"""What readers of a reconstruction job get: tables on the terminal, report.html, pictures and the headline."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TextIO

import pandas as pd
import yaml

from analysis import job_mirror
from analysis.pages import job_page
from analysis.pages.figures import Plot
from analysis.reconstruction import answers, pictures, plots
from analysis.reconstruction.job import ReconstructionResults
from analysis.reconstruction.page_tables import page_tables
from analysis.reconstruction.pictures import ImageGrid
from analysis.text_tables import print_table
from harness.files import atomic

ARTIFACTS = {"victims": "model", "candidates": "candidates", "alternatives": "alternatives"}
"""Subfolder of a job → type of the W&B artifact that holds it."""
PRIVATE_KEYS = {"out", "overwrite", "data_path", "checkpoint", "batch"}
"""Keys that name places on this machine."""


def show(results: ReconstructionResults, stream: TextIO) -> None:
    """Print the page's tables with question, answer, and what it rests on."""
    for table in page_tables(results.tables):
        print(table.title, file=stream)
        print_table(table, stream)
        print(file=stream)
    print(
        answers.question(results.config),
        headline(results),
        answers.scope(results.config),
        sep="\n",
        file=stream,
    )


def write(results: ReconstructionResults) -> list[Path]:
    """Write the report and its pictures into the job's folder; returns their paths."""
    images, figures = make_pictures(results), plots.all_plots(results.tables, results.matches)
    written = []
    for picture in images:
        written.append(results.folder.path / "images" / f"{picture.key}.png")
        atomic.write_bytes(written[-1], picture.png)
    path = results.folder.path / "report.html"
    atomic.write_text(path, render(results, figures, images))
    return [path, *written]


def render(results: ReconstructionResults, figures: Sequence[Plot], images: Sequence[ImageGrid]) -> str:
    """Return the page as self-contained HTML."""
    return job_page.render(
        title=results.config.mode,
        question=answers.question(results.config),
        headline=headline(results),
        scope=answers.scope(results.config),
        notes=results.warnings,
        tables=page_tables(results.tables),
        plots=figures,
        settings=results.config.model_dump(mode="json", exclude=PRIVATE_KEYS),
        kicker="Reconstruction of training images",
        command="reconstruct",
        pictures=images,
    )


def headline(results: ReconstructionResults) -> str:
    """Return the answer, from the tables alone."""
    return answers.answer(results.config, results.tables)


def make_pictures(results: ReconstructionResults) -> list[ImageGrid]:
    """Draw grids for the last checkpoint of each optimizer, first seed."""
    config = results.config
    grids = []
    for examination in results.latest():
        name = examination.subject.optimizer
        if "alternatives" in config.stages:
            grids.append(
                pictures.draw_alternatives(
                    examination.kkt_point, config.radius, examination.target, name, config.seed
                )
            )
        for objective in examination.objectives if results.tables["attack"] else ():
            if candidates := examination.candidates(objective):
                best = min(candidates, key=lambda c: (c.point.radius, c.residual))
                grids.append(
                    pictures.draw_reconstructions(
                        examination.target,
                        best,
                        examination.images.heldout,
                        f"{name}-{objective}",
                        config.seed,
                    )
                )
    return grids


def mirror(
    results: ReconstructionResults, picture_files: Sequence[Path], say: Callable[[str], None], exit_code: int
) -> None:
    """Log certificates, tables, pictures and artifacts of victims, candidates and alternatives to W&B."""
    config = results.config
    name = f"{config.mode}-{config.identity}"
    job_mirror.mirror(
        job_type="reconstruction",
        wandb=config.wandb.model_dump(),
        group="reconstruction",
        run_id=name,
        folder=results.folder.path,
        keys=_public_keys(results),
        rows=_over_steps(results),
        summary={"controls_failed": results.controls_failed, "exact_passed": results.exact_passed},
        exit_code=exit_code,
        say=say,
        facts={"identity": config.identity},
        attach=lambda run: _attach(run, results, picture_files, name),
    )


def _public_keys(results: ReconstructionResults) -> dict[str, Any]:
    return results.config.model_dump(mode="json", exclude=PRIVATE_KEYS)


def _over_steps(results: ReconstructionResults) -> list[dict[str, Any]]:
    """Return certificates as curves over training steps, with columns optimizer/set/seed/figure."""
    rows: dict[int, dict[str, Any]] = {}
    for row in results.tables["certificate"]:
        at = rows.setdefault(row["step"], {"step": row["step"]})
        start = f"{row['optimizer']}/set{row['data_set']}/seed{row['seed']}"
        at |= {
            f"{start}/{key}": v
            for key, v in row.items()
            if isinstance(v, int | float) and key not in ("data_set", "seed", "step")
        }
    return [rows[step] for step in sorted(rows)]


def _attach(run: Any, results: ReconstructionResults, picture_files: Sequence[Path], name: str) -> None:
    import wandb

    tables = {key: wandb.Table(dataframe=pd.DataFrame(rows)) for key, rows in results.tables.items() if rows}
    images = {f"images/{path.stem}": wandb.Image(str(path)) for path in picture_files}
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
        file.write(yaml.safe_dump(_public_keys(results), sort_keys=False, allow_unicode=True))
    run.log_artifact(artifact)
