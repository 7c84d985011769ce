"""Pages of companion jobs: small where they can be, decade ticks, tables that are turned."""

from __future__ import annotations

import hashlib
import re

import plotly.graph_objects as go
import pytest
from plotly.offline import get_plotlyjs, get_plotlyjs_version

from analysis.pages import job_page, theme
from analysis.pages.figures import Plot, decades, figure
from analysis.text_tables import TextTable

PUBLISHED = "99784e3abfb07b142a15e521a439e6d9addceadb3f79553fd24c72774f0649ba"
"""SHA-256 of plotly-basic.min.js in the npm package plotly.js-basic-dist-min 4.1.1."""


def page(*traces: object, question: str = "") -> str:
    return job_page.render(
        command="margin",
        kicker="",
        title="",
        headline="The answer.",
        scope="",
        notes=[],
        tables=[],
        plots=[Plot("p", "P", "", figure(list(traces)))],
        settings={},
        question=question,
    )


def test_the_bundle_is_the_published_file_of_the_version_that_plotly_describes_figures_for() -> None:
    text = theme.BASIC.read_text(encoding="utf-8")
    assert hashlib.sha256(text.encode()).hexdigest() == PUBLISHED
    version = re.search(r"plotly\.js \(basic - minified\) v(\d+)\.", text)
    assert version is not None
    assert version[1] == get_plotlyjs_version().split(".")[0]


def test_curves_and_bars_make_a_page_below_one_and_a_half_megabytes() -> None:
    text = page(go.Scatter(x=[1, 2], y=[1, 2]), go.Bar(x=[1], y=[2]))
    assert len(text.encode()) < 1_500_000
    assert text.count("plotly.js (basic - minified)") == 1


def test_a_heat_map_takes_the_whole_library_which_alone_draws_it() -> None:
    text = page(go.Heatmap(z=[[1, 2]]))
    assert "plotly.js (basic - minified)" not in text
    assert text.count(get_plotlyjs()[200:400]) == 1


def test_the_question_stands_above_the_answer() -> None:
    text = page(go.Scatter(x=[1], y=[1]), question="What closes the gap?")
    assert text.index("What closes the gap?") < text.index("The answer.")
    assert '<p class="detail">' not in page(go.Scatter(x=[1], y=[1]))


@pytest.mark.parametrize(
    ("low", "high", "each"), [(1.0, 1e5, 1), (1e-4, 1e9, 2), (1.0, 1e300, 30), (1.0, 1e303, 50)]
)
def test_ticks_are_powers_of_ten_and_few(low: float, high: float, each: int) -> None:
    axis = decades("step", low, high)
    assert (axis["type"], axis["dtick"]) == ("log", each)
    go.Layout(xaxis=axis)


def test_a_turned_table_has_a_column_per_row() -> None:
    table = TextTable(["optimizer", "gap", "C"], [["gd", "1", "2"], ["sign", "3", "4"]], "t", "c")
    turned = table.transposed()
    assert turned == TextTable(["optimizer", "gd", "sign"], [["gap", "1", "3"], ["C", "2", "4"]], "t", "c")
    assert turned.transposed() == table
