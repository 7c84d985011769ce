"""The HTML report of a margin job: one file, in the dress of the comparison report."""

from __future__ import annotations

import base64
import datetime
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from analysis.compare.plots import PALETTES, Plot, plain


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
    title: str,
    headline: str,
    scope: str,
    notes: Sequence[str],
    tables: Sequence[Table],
    plots: Sequence[Plot],
    settings: Mapping[str, Any],
    kicker: str = "Robustness margin",
    command: str = "margin",
    pictures: Sequence[Picture] = (),
) -> str:
    """The page as text. It loads nothing: plotly.js, styles, data and pictures are inside.

    Args:
        kicker: small print above the headline.
        command: whose page it is; names the figures.
        pictures: shown before the plots.
    """
    loader = ChoiceLoader([PackageLoader("analysis.margin"), PackageLoader("analysis.compare")])
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True)

    def raw(name: str) -> Markup:
        return Markup(loader.get_source(environment, name)[0])

    return environment.get_template("margin.html.j2").render(
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
        css=raw("report.css"),
        script=raw("report.js"),
        plotly=Markup(get_plotlyjs().replace("</script", "<\\/script")),
        palettes=_embedded({"arms": PALETTES, "parts": PALETTES}),
        data=_embedded({f"{command}-{plot.key}": asdict(plot) for plot in plots}),
    )


def _embedded(value: object) -> Markup:
    """JSON that can stand inside a script element whatever words it holds."""
    text = json.dumps(plain(value), separators=(",", ":"), allow_nan=False)
    return Markup(text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029"))
