"""Plotly figures as plain dictionaries, coloured by the page.

A trace says whose it is in ``meta`` (``arm``: index of the arm, ``part``: index of a kind), and the page's
script gives it the colour of the theme in use. Lists for the other horizontal axes ride along in ``meta.x``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import plotly.graph_objects as go

from analysis.formatting import to_jsonable

# Okabe & Ito's colours for all kinds of colour vision (2008), darker or lighter where the ground asks for it;
# lines differ in their dashes too.
PALETTES = {
    "light": ["#0072b2", "#d55e00", "#009e73", "#b0568c", "#b37a00", "#3d9bd6", "#6b7280", "#7a4f2a"],
    "dark": ["#5cb3ec", "#ff8c4a", "#35c99c", "#eaa0cb", "#f2bd48", "#a5dbff", "#b6bcc6", "#d2a679"],
}
DASHES = ["solid", "dash", "dot", "dashdot", "longdash", "longdashdot"]
GREY = "#8a94a3"
"""Of lines that are no arm's: levels, predictions, chance."""
_MARKUP = re.compile("<(?!/?extra>)")
MAX_POINTS = 400
"""Points of a curve in a plot: more than the pixels that tell them apart on a wide screen at half width."""


@dataclass
class Plot:
    """One figure of a report."""

    key: str
    title: str
    caption: str
    figure: dict[str, Any]
    height: int = 340
    choices: dict[str, list[str]] = field(default_factory=dict)
    """What the reader chooses between, by name: the traces are shown whose ``meta.choice`` lists the chosen
    indices.
    """
    axes: list[str] = field(default_factory=list)
    """Horizontal axes that the reader may choose from."""


def figure(traces: list[Any], **layout: Any) -> dict[str, Any]:
    """A checked plotly figure as a dictionary (arrays as lists, NaN as null), without template colours."""
    described = go.Layout(template="none", **layout).to_plotly_json()
    data = [to_jsonable(trace.to_plotly_json()) for trace in traces]
    return {"data": _without_markup(data), "layout": _without_markup(to_jsonable(described))}


def _without_markup(value: Any) -> Any:
    """Plain data whose texts plotly shows as they are; it would read `<a href=…>` in a name as a link.

    Only ``<extra>``, which our own templates hold, is left.
    """
    if isinstance(value, dict):
        return {key: _without_markup(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_without_markup(inner) for inner in value]
    return _MARKUP.sub("&lt;", value) if isinstance(value, str) else value


def colour(index: int) -> str:
    """Colour of an arm or part in the light theme; the page swaps it for the dark theme's."""
    return PALETTES["light"][index % len(PALETTES["light"])]


def line(arm: int, width: float = 2.2) -> dict[str, Any]:
    """Colour and dash of an arm; the dash goes on changing after the colours are used up."""
    return {"color": colour(arm), "dash": DASHES[arm % len(DASHES)], "width": width}
