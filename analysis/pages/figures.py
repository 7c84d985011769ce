"""Plotly figures as dictionaries, which the page colours.

A trace names its owner in ``meta`` (``arm``: index of the arm, ``part``: index of a kind), and the page's
script sets the colour of the theme in use. ``meta.x`` holds the values for the other horizontal axes.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Any

import plotly.graph_objects as go

from analysis.formatting import to_jsonable

# Okabe & Ito's colours for all kinds of colour vision (2008), adjusted to the background; lines also differ in
# their dashes.
PALETTES = {
    "light": ["#0072b2", "#d55e00", "#009e73", "#b0568c", "#b37a00", "#3d9bd6", "#6b7280", "#7a4f2a"],
    "dark": ["#5cb3ec", "#ff8c4a", "#35c99c", "#eaa0cb", "#f2bd48", "#a5dbff", "#b6bcc6", "#d2a679"],
}
DASHES = ["solid", "dash", "dot", "dashdot", "longdash", "longdashdot"]
GREY = "#8a94a3"
"""Colour of lines that belong to no arm: levels, predictions, chance."""
_MARKUP = re.compile("<(?!/?extra>)")
MAX_POINTS = 400
"""Most points of a curve: more than a plot of half a wide screen has pixels."""
MOST_DECADES = 10
"""Most powers of ten that are marked on an axis."""
NICE = (1, 2, 5, 10, 20, 30, 50, 100)
"""Decades between two marks; fp64 has 632."""


@dataclass
class Plot:
    """One figure of a report."""

    key: str
    title: str
    caption: str
    figure: dict[str, Any]
    height: int = 340
    choices: dict[str, list[str]] = field(default_factory=dict)
    """Name → options of a selection; traces whose ``meta.choice`` equals the selected indices are shown."""
    axes: list[str] = field(default_factory=list)
    """Horizontal axes that the reader can select."""


def figure(traces: list[Any], **layout: Any) -> dict[str, Any]:
    """Return a validated plotly figure as a dictionary (arrays as lists, NaN as null), without template colours."""
    described = go.Layout(template="none", **layout).to_plotly_json()
    data = [to_jsonable(trace.to_plotly_json()) for trace in traces]
    return {"data": _without_markup(data), "layout": _without_markup(to_jsonable(described))}


def decades(title: str, low: float, high: float) -> dict[str, Any]:
    """Return the layout of a logarithmic axis from `low` to `high` (both > 0) whose ticks are powers of ten alone."""
    first, last = math.log10(low), math.log10(high)
    room = 0.02 * max(last - first, 1.0)
    each = next(n for n in NICE if n * MOST_DECADES >= last - first)
    return {
        "title": {"text": title},
        "type": "log",
        "range": [first - room, last + room],
        "tick0": 0,
        "dtick": each,
        "exponentformat": "power",
    }


def _without_markup(value: Any) -> Any:
    """Escape markup in texts, which plotly would interpret (`<a href=…>` in a name as a link), except ``<extra>``."""
    if isinstance(value, dict):
        return {key: _without_markup(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_without_markup(inner) for inner in value]
    return _MARKUP.sub("&lt;", value) if isinstance(value, str) else value


def colour(index: int) -> str:
    """Return the colour of an arm or part in the light theme; the page replaces it in the dark theme."""
    return PALETTES["light"][index % len(PALETTES["light"])]


def line(arm: int, width: float = 2.2) -> dict[str, Any]:
    """Return colour and dash of an arm; their combinations outnumber the colours."""
    return {"color": colour(arm), "dash": DASHES[arm % len(DASHES)], "width": width}
