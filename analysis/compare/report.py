"""The report: one self-contained HTML page, and the same comparison as Markdown, CSV, JSON and a picture."""

from __future__ import annotations

import datetime
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from analysis.compare import (
    cost_plots,
    facts,
    moment_plots,
    picture,
    plots,
    provenance,
    renderings,
    tuning_plot,
    tuning_tables,
)
from analysis.compare.document import Document, Judged, to_json
from analysis.compare.main_plot import main_plot
from analysis.page import dress
from analysis.page.dress import plot_data

PICTURE = (1200, 640)
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


def write(document: Document, out: Path) -> Written:
    """Write report.html, comparison.md, comparison.csv, comparison.json and comparison.png into ``out``.

    The picture needs a Chromium; without one a remark says so.
    """
    out.mkdir(parents=True, exist_ok=True)
    html = out / "report.html"
    judged = [(j.table, f"{j.verdict.sentence} {j.verdict.scope}") for j in document.sets]
    texts = {
        html: render(document),
        out / "comparison.md": renderings.markdown(judged) if judged else f"{document.sentence}\n",
        out / "comparison.csv": renderings.to_csv(table for table, _ in judged),
        out / "comparison.json": json.dumps(to_json(document), indent=1, allow_nan=False) + "\n",
    }
    for path, text in texts.items():
        _replace(path, text)
    target = out / "comparison.png"
    shown = next((j for j in document.sets if main_plot(j.chosen)), None)
    if shown is None:
        remark = f"{target.name} is not written: no run logged a loss" if document.runs else None
    else:
        remark = picture.photograph(render_picture(shown), target, width=PICTURE[0], height=PICTURE[1])
    files = [*texts, *([target] if shown is not None and remark is None else [])]
    return Written(html, files, [remark] if remark else [])


def _replace(path: Path, text: str) -> None:
    """Whole or not at all: a reader never sees half a file."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    scratch.write_text(text, encoding="utf-8")
    scratch.replace(path)


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
    return dress.render(template, "analysis.compare", axis_titles=plots.AXIS_TITLES, **values)


def _section(judged: Judged, key: str) -> dict[str, Any]:
    chosen = judged.chosen
    main = main_plot(chosen)
    training = [plots.wall_clock(chosen), cost_plots.step_time(chosen), cost_plots.memory(chosen)]
    found = moment_plots.find(chosen)
    by_step, by_depth = moment_plots.over_steps(chosen, found), moment_plots.over_depth(chosen, found)
    pairs = [[by_step[name], *([by_depth[name]] if name in by_depth else [])] for name in by_step]
    heat = moment_plots.heat_map(chosen, found)
    sensitivity, studies = tuning_plot.sensitivity(chosen), [arm for _, arm in tuning_tables.of_set(chosen)]
    shown = [main, sensitivity, *training, *(plot for pair in pairs for plot in pair), heat]
    inside = (*BENEATH.values(), *BESIDE.values(), SPANNING, *UNSHOWN)
    return {
        "key": key,
        "judged": judged,
        "main": main,
        "finish": facts.finish(chosen),
        "columns": [c for c in judged.table.columns if c.key not in inside],
        "beside": BESIDE,
        "beneath": BENEATH,
        "tuning": tuning_tables.overview(studies) if studies else None,
        "trials": tuning_tables.listing(studies),
        "sensitivity": sensitivity,
        "training": [plot for plot in training if plot is not None],
        "pairs": pairs,
        "heat": heat,
        "matrix": facts.pair_matrix(chosen) if len(chosen.arms) > 1 else [],
        "provenance": provenance.provenance(chosen),
        "ownership": facts.ownership(chosen),
        "parameters": facts.parameters(chosen),
        "difference": facts.config_difference(chosen),
        "environment": facts.environment(chosen.runs),
        "data": plot_data(key, [plot for plot in shown if plot is not None]),
    }
