"""The page of a companion job: what was found in a sentence, tables, pictures, plots, settings."""

from __future__ import annotations

import base64
import datetime
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from analysis.pages import theme
from analysis.pages.figures import Plot


@dataclass(frozen=True)
class Table:
    """A table of words."""

    heads: list[str]
    rows: list[list[str]]
    title: str = ""
    caption: str = ""


class Picture(Protocol):
    """A PNG with its words."""

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
    tables: Sequence[Table],
    plots: Sequence[Plot],
    settings: Mapping[str, Any],
    pictures: Sequence[Picture] = (),
) -> str:
    """The page as text. It loads nothing: plotly.js, styles, data and pictures are inside.

    Args:
        command: whose page it is; names the figures.
        kicker: small print above the headline.
        title: of the window, after the command.
        headline: the result in a sentence.
        scope: what the headline rests on.
        notes: what a reader must know before believing a number.
        settings: those that are None or empty are left out.
        pictures: shown before the plots.
    """
    return theme.render(
        "job.html.j2",
        title=title,
        headline=headline,
        scope=scope,
        notes=notes,
        tables=tables,
        plots=plots,
        kicker=kicker,
        command=command,
        pictures=[(p.title, p.caption, base64.b64encode(p.png).decode()) for p in pictures],
        settings={key: value for key, value in settings.items() if value not in (None, {}, "")},
        made=datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M"),
        data=theme.plot_data(command, plots),
    )
