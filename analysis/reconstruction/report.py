"""What readers of a reconstruction job get: tables on the terminal, report.html, pictures and the headline."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import pandas as pd
import yaml
from rich import box, table
from rich.console import Console
from rich.text import Text

from analysis import job_mirror
from analysis.pages import job_page
from analysis.pages.figures import Plot
from analysis.reconstruction import pictures, plots, susceptibility
from analysis.reconstruction.job import ReconstructionResults
from analysis.reconstruction.pictures import ImageGrid
from analysis.reconstruction.subjects import TableRow
from analysis.text_tables import TextTable
from harness.files import atomic

COLUMNS: dict[str, tuple[tuple[str, str], ...]] = {
    "certificate": (
        ("optimizer", "optimizer"), ("seed", "seed"), ("step", "step"), ("margin_min", "least margin"),
        ("residual", "residual, fixed gates"), ("residual_clarke", "Clarke gates"), ("alignment_l2", "a ℓ2"),
        ("alignment_spectral", "a spectral"), ("alignment_linf", "a ℓ∞"), ("alignment_hybrid", "a own norm"),
        ("outside", "W₁ outside span"), ("split_radius", "split radius"), ("groups", "groups"),
    ),
    "alternatives": (
        ("optimizer", "optimizer"), ("step", "step"), ("kind", "kind"), ("radius", "radius"), ("points", "points"),
        ("residual", "residual"), ("residual_inherited", "inherited gates"), ("residual_projected", "projected"),
        ("margin_min", "least margin"), ("nn_distance", "nearest"), ("is_control", "control"), ("passed", "passed"),
    ),
    "attack": (
        ("optimizer", "optimizer"), ("seed", "seed"), ("step", "step"), ("kind", "kind"), ("objective", "objective"),
        ("radius", "radius"), ("residual", "K"), ("residual_true", "K of the truth"), ("nn_top5", "NN top 5"),
        ("nn_top5_margin", "on margin"), ("ncc_top5", "NCC top 5"), ("good", "SSIM > 0.4"),
    ),
    "susceptibility": (
        ("optimizer", "optimizer"), ("step", "step"), ("objective", "objective"), ("radius", "radius"),
        ("seeds", "seeds"), ("advantage_nn_top5_margin", "advantage, NN on margin"),
        ("half_width_nn_top5_margin", "± 95 %"), ("advantage_ncc_top5", "advantage, NCC"),
        ("half_width_ncc_top5", "± 95 %"), ("beats_truth", "fits better than truth"),
    ),
}  # fmt: skip
"""Table → (key, heading) of the columns shown to readers; files and JSON have all."""
ARTIFACTS = {"victims": "model", "candidates": "candidates", "alternatives": "alternatives"}
"""Subfolder of a job → type of the W&B artifact that holds it."""
PRIVATE_KEYS = {"out", "overwrite", "data_path", "checkpoint", "batch"}
"""Keys that name places on this machine."""
TITLES = {
    "susceptibility": "Susceptibility",
    "certificate": "Certificates",
    "alternatives": "Alternatives",
    "attack": "Attacks and baselines",
}
CAPTIONS = {
    "susceptibility": susceptibility.SCOPE,
    "certificate": "Networks are scaled to a least margin of 1. a: alignment with the multipliers' gradient in a norm, "
    "1 at a KKT point of that norm.",
    "alternatives": "A set passes if it explains the weights as the training set does. Controls are wrong on purpose "
    "and must not pass.",
    "attack": "K: relative squared residual. NN: distance of training images to the nearest candidate, mean of the "
    "five best; on margin: candidates scaled to the least margin. NCC: correlation, mean of the five best.",
}


def show(results: ReconstructionResults, console: Console) -> None:
    """Print the tables that have rows, and what they are a claim about."""
    for name, rows in results.tables.items():
        if rows:
            console.print(_terminal_table(name, rows))
    if results.tables["susceptibility"]:
        console.print(results.document()["scope"])


def cell(value: Any) -> str:
    """Return a value as readers see it: four digits, yes or no, a dash for a missing one."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _terminal_table(name: str, rows: Sequence[TableRow]) -> table.Table:
    grid = table.Table(title=name, title_justify="left", box=box.SIMPLE, highlight=False)
    for key, heading in COLUMNS[name]:
        is_text = any(isinstance(row.get(key), str) for row in rows)
        grid.add_column(heading, justify="left" if is_text else "right")
    for row in rows:
        grid.add_row(*(Text(cell(row.get(key))) for key, _ in COLUMNS[name]))
    return grid


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
        headline=headline(results),
        scope=susceptibility.SCOPE
        if results.config.mode == "victim"
        else "Exact statements about one network.",
        notes=results.warnings,
        tables=[_page_table(name, results.tables[name]) for name in TITLES if results.tables[name]],
        plots=figures,
        settings=results.config.model_dump(mode="json", exclude=PRIVATE_KEYS),
        kicker="Reconstruction of training images",
        command="reconstruct",
        pictures=images,
    )


def headline(results: ReconstructionResults) -> str:
    """Return the result in a sentence or two, from the tables alone."""
    rows = results.tables["alternatives"]
    # The Muon family shares the first layer's orthogonalized gradient, which is less than the whole condition.
    good = [r for r in rows if not r["is_control"] and r["passed"] and r["kind"] != "muon_family"]
    controls = [row for row in rows if row["is_control"]]
    sentence = ""
    if rows:
        far = max((row["nn_distance"] for row in good), default=0.0)
        refused = sum(not row["passed"] for row in controls)
        sentence = (
            f"{len(good)} other training sets explain the weights, the farthest {far:.3g} away from any training "
            f"image; {refused} of {len(controls)} controls are refused."
        )
    attacks = [row for row in results.tables["attack"] if row["kind"] == "attack"]
    if attacks:
        far = [row for row in attacks if row["radius"] == max(r["radius"] for r in attacks)]
        below = fmean(row["beats_truth"] for row in far)
        sentence += (
            f" With candidates started at {far[0]['radius']:g} times the usual norm, {below:.0%} of the attacks fit "
            f"the weights better than the training images do."
        )
    return sentence.strip() or "Certificates only."


def make_pictures(results: ReconstructionResults) -> list[ImageGrid]:
    """Draw grids for the last checkpoint of each optimizer, first seed."""
    config, images = results.config, results.images
    grids = []
    for examination in results.latest():
        name = examination.subject.optimizer
        if examination.makes_alternatives:
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
                        examination.target, best, images.heldout, f"{name}-{objective}", config.seed
                    )
                )
    return grids


def _page_table(name: str, rows: Sequence[TableRow]) -> TextTable:
    columns = COLUMNS[name]
    shown = [[cell(row.get(key)) for key, _ in columns] for row in rows]
    return TextTable([heading for _, heading in columns], shown, TITLES[name], CAPTIONS[name])


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
    """Return certificates as curves over training steps, with columns optimizer/seed/figure."""
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
