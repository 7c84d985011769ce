"""A template in the dress that all reports wear: one self-contained page that loads nothing."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from analysis.page.figures import DASHES, PALETTES, Plot
from analysis.plain import plain

PART_PALETTES = {
    "light": ["#9aa3ad", "#0072b2", "#d55e00", "#009e73", "#b37a00", "#b0568c", "#3d9bd6", "#7a4f2a"],
    "dark": ["#87909b", "#5cb3ec", "#ff8c4a", "#35c99c", "#f2bd48", "#eaa0cb", "#a5dbff", "#d2a679"],
}
"""Colours of the parts of a bar, apart from the arms' (a part is no arm)."""
DASH_PATTERNS = dict(zip(DASHES, ("", "7 4", "2 4", "7 3 2 3", "11 4", "11 3 2 3"), strict=True))


def render(template: str, package: str = "analysis.page", **values: Any) -> str:
    """A page as text; plotly.js, styles and script are inside it.

    Args:
        template: name of the file.
        package: has it in its folder `templates`; styles and script come from here.
        values: of the template, which has beside them `css`, `script`, `plotly`, `palettes`, `dashes`, `colours`.
    """
    loader = ChoiceLoader([PackageLoader(package), PackageLoader("analysis.page")])
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True)

    def raw(name: str) -> Markup:
        return Markup(loader.get_source(environment, name)[0])

    shared = {
        "css": raw("report.css"),
        "script": raw("report.js"),
        "plotly": Markup(get_plotlyjs().replace("</script", "<\\/script")),
        "palettes": embedded({"arms": PALETTES, "parts": PART_PALETTES}),
        "dashes": [DASH_PATTERNS[name] for name in DASHES],
        "colours": PALETTES["light"],
    }
    return environment.get_template(template).render(**shared, **values)


def plot_data(key: str, shown: Iterable[Plot]) -> Markup:
    """Plots for a script element of class ``figures``; they are drawn where data-figure is ``key``-(plot's key)."""
    return embedded({f"{key}-{plot.key}": asdict(plot) for plot in shown})


def embedded(value: object) -> Markup:
    """JSON that can stand inside a script element whatever words it holds."""
    text = json.dumps(plain(value), separators=(",", ":"), allow_nan=False)
    return Markup(text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029"))
