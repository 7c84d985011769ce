"""Render the page of a companion job: the result in a sentence, tables, pictures, plots, settings."""

from __future__ import annotations

import base64
import datetime
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from analysis.pages import theme
from analysis.pages.figures import Plot
from analysis.text_tables import TextTable


class Picture(Protocol):
    """A PNG with title and caption."""

    @property
    def title(self) -> str: ...
    @property
    def caption(self) -> str: ...
    @property
    def png(self) -> bytes: ...


def render(
    *,
    command: str,
    kicker: str,
    title: str,
    headline: str,
    scope: str,
    notes: Sequence[str],
    tables: Sequence[TextTable],
    plots: Sequence[Plot],
    settings: Mapping[str, Any],
    pictures: Sequence[Picture] = (),
    question: str = "",
    findings: Sequence[str] = (),
) -> str:
    """Return the page as text; plotly.js, styles, data and pictures are embedded, and nothing is loaded.

    Args:
        command: name of the job, which also names the figures.
        kicker: small print above the question.
        title: shown after the command in the window title.
        headline: the result in a sentence.
        scope: the data on which the headline is based.
        notes: warnings about the numbers.
        settings: None and empty values are omitted.
        pictures: shown before the plots.
        question: that the headline answers, shown above it.
        findings: sentences below the headline, for results that one sentence does not hold.
    """
    return theme.render(
        "job.html.j2",
        title=title,
        headline=headline,
        scope=scope,
        notes=notes,
        findings=findings,
        tables=tables,
        plots=plots,
        kicker=kicker,
        question=question,
        command=command,
        pictures=[(p.title, p.caption, base64.b64encode(p.png).decode()) for p in pictures],
        settings={key: value for key, value in settings.items() if value not in (None, {}, "")},
        made=datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M"),
        data=theme.plot_data(command, plots),
        has_heat_map=theme.has_heat_map(plots),
    )
