"""The report: one self-contained HTML page, and the same comparison as Markdown, CSV, JSON and a picture."""

from __future__ import annotations

import datetime
import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from analysis.compare import renderings
from analysis.compare.document import Document, Judged, to_json
from analysis.pages import matplotlib_figures, screenshot, theme
from analysis.pages.theme import plot_data
from analysis.report import cost_plots, details, moment_plots, plots, provenance, tuning_plot, tuning_tables
from analysis.report.main_plot import main_plot
from harness import visible
from harness.errors import InputError
from harness.files import atomic

PICTURE = (1200, 640)
_ASIDE = ".report-"
"""Beginning of the name of the folder that a report is written to before its files are put in place."""
BESIDE = {"loss": "interval"}
"""Columns that stand in the cell of another, behind its number."""
BENEATH = {"loss": "perplexity", "lr": "lr_standing", "state": "state_kinds"}
"""Columns that stand in small print below a number, so that the table fits a screen."""
UNSHOWN = ("lr_source",)
"""Told in the notes below the table."""
SPANNING = "outcome"
"""Shown across the row of a run that did not finish; of an arm that did, n says it."""


@dataclass(frozen=True)
class Written:
    """Files that were written, remarks on those that could not be, and where the comparison lies elsewhere."""

    html: Path
    files: list[Path]
    remarks: list[str]
    links: dict[str, str] = field(default_factory=dict)
    """What → its address."""


def write(document: Document, out: Path, *, figures: bool = False) -> Written:
    """Write report.html, comparison.md, comparison.csv, comparison.json and comparison.png into ``out``.

    All are made before the first is put in its place, so that none is there in halves. The picture is taken by a
    Chromium; without one it is drawn with ``figures``, and else a remark says so.

    Args:
        document: of the comparison.
        out: folder; made if it is not there.
        figures: write each plot as ``figures/NAME.png`` too, by matplotlib.

    Raises:
        InputError: the folder can't be written to, or matplotlib is needed and missing.
    """
    if figures:
        matplotlib_figures.require()
    html = out / "report.html"
    judged = [(j.table, f"{j.verdict.sentence} {j.verdict.scope}") for j in document.sets]
    texts = {
        "comparison.md": renderings.markdown(judged)
        if judged
        else f"{visible.markdown(document.sentence)}\n",
        "comparison.csv": renderings.to_csv(table for table, _ in judged),
        "comparison.json": json.dumps(to_json(document), indent=1, allow_nan=False) + "\n",
        "report.html": render(document),
    }
    files = {name: text.encode("utf-8", "replace") for name, text in texts.items()}
    picture_bytes, remark = _picture(document, figures)
    if picture_bytes is not None:
        files["comparison.png"] = picture_bytes
    if figures:
        files |= _figures(document)
    _put(files, out, stale=["comparison.png"])
    return Written(
        html, [html, *(out / name for name in files if name != html.name)], [remark] if remark else []
    )


def _picture(document: Document, figures: bool) -> tuple[bytes | None, str | None]:
    """Return the main plot of the first set that has one, or why there is none."""
    name = "comparison.png"
    shown = next((j for j in document.sets if main_plot(j.chosen)), None)
    if shown is None:
        return None, f"{name} is not written: no run logged a loss" if document.runs else None
    with tempfile.TemporaryDirectory(prefix="optbench-") as scratch:
        target = Path(scratch, name)
        remark = screenshot.photograph(render_picture(shown), target, width=PICTURE[0], height=PICTURE[1])
        if remark is None:
            return target.read_bytes(), None
    plot = main_plot(shown.chosen)
    if plot is not None and figures:
        return matplotlib_figures.png(plot, heading=shown.verdict.headline), None
    return None, f"{remark}; --figures png draws it by matplotlib"


def _figures(document: Document) -> dict[str, bytes]:
    """File name → PNG of every plot of the page."""
    return {
        f"figures/set{index}-{plot.key}.png": matplotlib_figures.png(plot)
        for index, judged in enumerate(document.sets)
        for plot in _plots(judged)["all"]
    }


def _put(files: Mapping[str, bytes], out: Path, stale: Sequence[str]) -> None:
    """Put all files in place at once: they are written aside, flushed, and renamed; the page comes last.

    Args:
        files: name below ``out`` → content.
        out: folder.
        stale: names of an earlier report that are removed where this one does not have them.

    Raises:
        InputError: something can't be written; what was there before is left as it was.
    """
    aside = out / f"{_ASIDE}{os.getpid()}"
    try:
        out.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(out)
        for name, content in files.items():
            path = aside / name
            path.parent.mkdir(parents=True, exist_ok=True)
            atomic.write_bytes(path, content)
        for name in files:
            target = out / name
            target.parent.mkdir(exist_ok=True)
            os.replace(aside / name, target)
        for name in set(stale) - files.keys():
            (out / name).unlink(missing_ok=True)
        atomic.sync_folder(out)
    except OSError as error:
        reason = f"can't be written to: {error.strerror or error}"
        raise InputError("report", out, reason, fix="--out FOLDER, on a disk with room") from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _remove_leftovers(out: Path) -> None:
    """What a report that was killed while it was written has left."""
    for path in out.glob(f"{_ASIDE}*"):
        number = path.name.removeprefix(_ASIDE)
        if (
            path.is_dir()
            and not path.is_symlink()
            and number.isdecimal()
            and not psutil.pid_exists(int(number))
        ):
            shutil.rmtree(path, ignore_errors=True)


def render(document: Document) -> str:
    """The page as text. It loads nothing: plotly.js, styles and data are inside."""
    made = datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M")
    sections = [_section(judged, f"set{index}") for index, judged in enumerate(document.sets)]
    return _page("report.html.j2", document=document, sections=sections, made=made)


def render_picture(judged: Judged) -> str:
    """The page that is photographed: verdict and main plot of one set."""
    main = main_plot(judged.chosen)
    return _page("picture.html.j2", judged=judged, main=main, data=plot_data("main", [main] if main else []))


def _page(template: str, **values: Any) -> str:
    return theme.render(template, "analysis.report", axis_titles=plots.AXIS_TITLES, **values)


def _plots(judged: Judged) -> dict[str, Any]:
    """The plots of one set by where the page has them; ``all`` lists them in that order."""
    chosen = judged.chosen
    main = main_plot(chosen)
    training = [plots.training_loss(chosen), cost_plots.step_time(chosen), cost_plots.memory(chosen)]
    found = moment_plots.find(chosen)
    by_step, by_depth = moment_plots.over_steps(chosen, found), moment_plots.over_depth(chosen, found)
    pairs = [[by_step[name], *([by_depth[name]] if name in by_depth else [])] for name in by_step]
    heat = moment_plots.heat_map(chosen, found)
    sensitivity = tuning_plot.sensitivity(chosen)
    shown = [main, sensitivity, *training, *(plot for pair in pairs for plot in pair), heat]
    return {
        "main": main,
        "sensitivity": sensitivity,
        "training": [plot for plot in training if plot is not None],
        "pairs": pairs,
        "heat": heat,
        "all": [plot for plot in shown if plot is not None],
    }


def _section(judged: Judged, key: str) -> dict[str, Any]:
    chosen = judged.chosen
    drawn = _plots(judged)
    studies = [arm for _, arm in tuning_tables.of_set(chosen)]
    inside = (*BENEATH.values(), *BESIDE.values(), SPANNING, *UNSHOWN)
    return {
        "key": key,
        "judged": judged,
        "finish": details.finish(chosen),
        "columns": [c for c in judged.table.columns if c.key not in inside],
        "beside": BESIDE,
        "beneath": BENEATH,
        "tuning": tuning_tables.overview(studies) if studies else None,
        "trials": tuning_tables.listing(studies),
        "matrix": details.pair_matrix(chosen) if len(chosen.arms) > 1 else [],
        "provenance": provenance.provenance(chosen),
        "ownership": details.ownership(chosen),
        "parameters": details.parameters(chosen),
        "difference": details.config_difference(chosen),
        "environment": details.environment(chosen.runs),
        "data": plot_data(key, drawn["all"]),
        **drawn,
    }
