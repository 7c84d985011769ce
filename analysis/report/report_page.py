"""Render the HTML page of a report, and the page of its picture."""

from __future__ import annotations

import datetime
from dataclasses import dataclass
from typing import Any

from analysis.comparison.document import Document, JudgedSet
from analysis.comparison.sets import ComparisonSet
from analysis.pages import theme
from analysis.pages.figures import Plot
from analysis.report import details, examples, moment_plots, plots, tuning
from analysis.report.main_plot import main_plot, validation_loss
from analysis.runs.curves import AXIS_TITLES

BENEATH = {"lr": {"lr_standing": ""}, "state": {"state_kinds": ""}}
"""Columns that are shown in small print below a number, so that the table fits a screen, and the word before each."""
BENEATH_LOSS = {"perplexity": "ppl "}
BENEATH_METRIC = {"seeds_interval": "seeds ± ", "examples_interval": "examples ± "}
HIDDEN = ("lr_source",)
"""Columns whose content is in the notes below the table."""
SPANNING = "outcome"
"""Column that spans the row of an unfinished run; for a finished arm, n states the same."""


@dataclass(frozen=True)
class SetPlots:
    """The plots of one set by their place on the page."""

    main: Plot | None
    sensitivity: Plot | None
    training: list[Plot]
    pairs: list[list[Plot]]
    """Each moment figure over steps, and over depth if the model has several blocks."""
    heat: Plot | None

    def in_order(self) -> list[Plot]:
        """Return all plots in the order of the page."""
        pairs = [plot for pair in self.pairs for plot in pair]
        everything = [self.main, self.sensitivity, *self.training, *pairs, self.heat]
        return [plot for plot in everything if plot is not None]


def render(document: Document) -> str:
    """Return the page as text; plotly.js, styles and data are embedded, and nothing is loaded."""
    made = datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M")
    sections = [_section(judged, f"set{index}") for index, judged in enumerate(document.sets)]
    has_heat_map = any(section["heat"] for section in sections)
    found = document.profiles
    return _render_template(
        "report.html.j2",
        document=document,
        sections=sections,
        made=made,
        has_heat_map=has_heat_map,
        profiles=None if found is None else details.profiles(found),
    )


def render_picture(judged: JudgedSet) -> str:
    """Return the page of which the picture is taken: verdict and main plot of one set."""
    main = main_plot(judged.comparison)
    data = theme.plot_data("main", [main] if main else [])
    return _render_template("picture.html.j2", judged=judged, main=main, data=data)


def build_plots(comparison: ComparisonSet) -> SetPlots:
    """Draw all plots of one set."""
    training = [
        validation_loss(comparison),
        plots.training_loss(comparison),
        plots.step_time(comparison),
        plots.memory(comparison),
    ]
    spectra = moment_plots.read_spectra(comparison)
    by_step = moment_plots.over_steps(comparison, spectra)
    by_depth = moment_plots.over_depth(comparison, spectra)
    return SetPlots(
        main=main_plot(comparison),
        sensitivity=tuning.sensitivity(comparison),
        training=[plot for plot in training if plot is not None],
        pairs=[[by_step[name], *([by_depth[name]] if name in by_depth else [])] for name in by_step],
        heat=moment_plots.heat_map(comparison, spectra),
    )


def _section(judged: JudgedSet, key: str) -> dict[str, Any]:
    """Return what the template shows of one set."""
    comparison = judged.comparison
    drawn = build_plots(comparison)
    studies = [study for _, study in comparison.studies]
    measure = comparison.measure
    # The interval is shown in the cell of its mean, after the number.
    beside = {measure.name: "interval"}
    beneath = {measure.name: BENEATH_LOSS if measure.is_loss else BENEATH_METRIC, **BENEATH}
    inside = (*(key for keys in beneath.values() for key in keys), *beside.values(), SPANNING, *HIDDEN)
    return {
        "key": key,
        "judged": judged,
        "finish": details.last_evaluations(comparison),
        "columns": [c for c in judged.table.columns if c.key not in inside],
        "beside": beside,
        "beneath": beneath,
        "tuning": tuning.overview(studies) if studies else None,
        "trials": tuning.trial_table(studies),
        "matrix": details.pair_matrix(comparison) if len(comparison.arms) > 1 else [],
        "metrics": examples.all_metrics(comparison),
        "losses": examples.losses(comparison),
        "agreement": examples.agreement(comparison),
        "changed": examples.changed(comparison),
        "provenance": details.provenance(comparison),
        "ownership": details.ownership(comparison),
        "parameters": details.parameters(comparison),
        "difference": details.config_difference(comparison),
        "environment": details.environment(comparison.runs),
        "data": theme.plot_data(key, drawn.in_order()),
        **vars(drawn),
    }


def _render_template(template: str, **values: Any) -> str:
    return theme.render(template, "analysis.report", axis_titles=AXIS_TITLES, **values)
