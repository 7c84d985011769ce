"""Draw plots of a report as PNG files with matplotlib, without a browser (`pip install "optbench[figures]"`)."""

from __future__ import annotations

import html
import io
import re
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from analysis.pages.figures import GREY, Plot
from harness.errors import InputError
from harness.visible import visible

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH, DPI = 1000, 100
"""Pixels of a figure at a scale of 1; files have twice as many."""
_DASHES = {"dash": (0, (6, 3)), "dot": (0, (1.5, 3)), "dashdot": "dashdot", "longdash": (0, (10, 4))}
_DASHES |= {"longdashdot": (0, (10, 3, 2, 3)), "solid": "solid"}
_MARKERS = {"x": "x", "star": "*", "circle": "o"}


def is_available() -> bool:
    """Return True if matplotlib is installed."""
    from importlib.util import find_spec

    return find_spec("matplotlib") is not None


def require() -> None:
    """Check that matplotlib is installed.

    Raises:
        InputError: it is not; the message states how to install it.
    """
    if not is_available():
        raise InputError(
            "--figures",
            "png",
            "needs matplotlib",
            fix="pip install 'matplotlib>=3.9,<4', or leave --figures out",
        )


def png(plot: Plot, *, heading: str = "") -> bytes:
    """Draw one plot of a report with its first axis and first selection, in the light theme.

    Args:
        plot: as `analysis.pages` draws it.
        heading: a line above the title.
    """
    # The object interface does not change the user's pyplot backend and open figures.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH / DPI, max(plot.height, 300) / DPI), dpi=2 * DPI, layout="constrained")
    axes = figure.add_subplot()
    layout = plot.figure["layout"]
    _axis(axes, "x", layout.get("xaxis") or {})
    _axis(axes, "y", layout.get("yaxis") or {})
    traces = [trace for trace in plot.figure["data"] if trace.get("visible", True)]
    bottoms: dict[str, float] = {}
    for trace in traces:
        _TRACES[trace["type"]](figure, axes, trace, bottoms)
    _frame(axes, layout, plot)
    _legend(axes, layout)
    title = "\n".join(_text(line) for line in (heading, plot.title) if line)
    axes.set_title(title, loc="left", fontsize=11)
    figure.supxlabel(_text(plot.caption), fontsize=7, color="#5a6472", wrap=True, ha="left", x=0.01)
    out = io.BytesIO()
    with warnings.catch_warnings():
        # A character that the font lacks is drawn as a box.
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        FigureCanvasAgg(figure).print_png(out)
    return out.getvalue()


def _scatter(figure: Figure, axes: Axes, trace: dict[str, Any], bottoms: dict[str, float]) -> None:
    x, y = _numbers(trace.get("x")), _numbers(trace.get("y"))
    line, marker = trace.get("line") or {}, trace.get("marker") or {}
    if trace.get("fill"):
        fill = trace.get("fillcolor") or line.get("color") or GREY
        axes.fill(x, y, color=_colour(fill), alpha=trace.get("opacity") or 0.2, linewidth=0)
        return
    mode = trace.get("mode") or "lines"
    colour = _colour(line.get("color") or marker.get("color") or GREY)
    label = _text(trace["name"]) if trace.get("name") and trace.get("showlegend", True) else None
    style = _DASHES.get(line.get("dash") or "solid", "solid") if "lines" in mode else "none"
    axes.plot(
        x,
        y,
        color=colour,
        linestyle=style,
        linewidth=line.get("width") or 1.5,
        alpha=trace.get("opacity"),
        label=label,
    )
    if "markers" in mode:
        _markers(axes, x, y, marker, colour)


def _markers(axes: Axes, x: list[float], y: list[float], marker: dict[str, Any], colour: str) -> None:
    symbols, sizes = marker.get("symbol") or "circle", marker.get("size") or 5
    for index, (px, py) in enumerate(zip(x, y, strict=False)):
        symbol = symbols[index] if isinstance(symbols, list) else symbols
        size = sizes[index] if isinstance(sizes, list) else sizes
        if size:
            axes.plot([px], [py], color=colour, marker=_MARKERS.get(symbol, "o"), markersize=0.8 * size)


def _bar(figure: Figure, axes: Axes, trace: dict[str, Any], bottoms: dict[str, float]) -> None:
    is_horizontal = trace.get("orientation") == "h"
    names = [_text(str(name)) for name in trace["y" if is_horizontal else "x"]]
    values = _numbers(trace["x" if is_horizontal else "y"])
    sizes = [value if value == value else 0.0 for value in values]
    starts = [bottoms.get(name, 0.0) for name in names]
    part = (trace.get("meta") or {}).get("part")
    colour = (
        _part_colour(part) if part is not None else _colour((trace.get("marker") or {}).get("color") or GREY)
    )
    label = _text(str(trace.get("name") or "")) or None
    if is_horizontal:
        axes.barh(names, sizes, left=starts, height=0.6, color=colour, label=label)
    else:
        axes.bar(names, sizes, bottom=starts, width=0.6, color=colour, label=label)
    for name, size in zip(names, sizes, strict=True):
        bottoms[name] = bottoms.get(name, 0.0) + size


def _heatmap(figure: Figure, axes: Axes, trace: dict[str, Any], bottoms: dict[str, float]) -> None:
    rows = [_numbers(row) for row in trace["z"]]
    low, high = trace.get("zmin"), trace.get("zmax")
    drawn = axes.imshow(rows, aspect="auto", cmap="cividis", vmin=low, vmax=high, interpolation="nearest")
    for set_ticks, names, most in ((axes.set_xticks, trace["x"], 14), (axes.set_yticks, trace["y"], 40)):
        stride = max(1, -(-len(names) // most))
        set_ticks(range(0, len(names), stride), [_text(str(name)) for name in names[::stride]], fontsize=7)
    title = ((trace.get("colorbar") or {}).get("title") or {}).get("text") or ""
    figure.colorbar(drawn, ax=axes, label=_text(title))


_TRACES = {"scatter": _scatter, "bar": _bar, "heatmap": _heatmap}


def _axis(axes: Axes, name: str, described: dict[str, Any]) -> None:
    title = (described.get("title") or {}).get("text") or ""
    (axes.set_xlabel if name == "x" else axes.set_ylabel)(_text(title))
    if described.get("type") == "log":
        (axes.set_xscale if name == "x" else axes.set_yscale)("log")


def _frame(axes: Axes, layout: dict[str, Any], plot: Plot) -> None:
    """Set ranges, levels and grid."""
    meta = layout.get("meta") or {}
    ranges = (meta.get("ranges") or {}).get(plot.axes[0] if plot.axes else "", {}).get("finish")
    if ranges:
        axes.set_xlim(*ranges["x"])
        axes.set_ylim(*ranges["y"])
        for key in ("entropy", "target"):
            if meta.get(key) is not None:
                axes.axhline(meta[key], color=GREY, linewidth=0.8, linestyle="dotted")
    if (layout.get("yaxis") or {}).get("autorange") == "reversed" and not meta.get("heat"):
        axes.invert_yaxis()
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    if not meta.get("heat"):
        axes.grid(color="#e8ebef", linewidth=0.7)
        axes.set_axisbelow(True)


def _legend(axes: Axes, layout: dict[str, Any]) -> None:
    handles, labels = axes.get_legend_handles_labels()
    is_main = bool((layout.get("meta") or {}).get("main"))
    if handles and (layout.get("meta") or {}).get("bars"):
        axes.legend(
            handles,
            labels,
            fontsize=8,
            frameon=False,
            ncols=6,
            loc="lower right",
            bbox_to_anchor=(1, 1),
            borderaxespad=0,
        )
    elif handles and (is_main or layout.get("showlegend") is not False) and len(labels) <= 24:
        axes.legend(handles, labels, fontsize=8, frameon=False)


def _numbers(values: Sequence[Any] | None) -> list[float]:
    """Return the values of a plotly trace; null becomes a gap."""
    return [float("nan") if value is None else float(value) for value in values or ()]


def _colour(colour: object) -> str:
    """Return a colour that matplotlib knows; grey for those that the page's script sets."""
    return colour if isinstance(colour, str) and re.fullmatch("#[0-9a-fA-F]{6}", colour) else GREY


def _part_colour(part: int) -> str:
    from analysis.pages.theme import PART_PALETTES

    return PART_PALETTES["light"][part % len(PART_PALETTES["light"])]


def _text(text: str) -> str:
    """Escape a label: matplotlib reads ``$…$`` as mathematics and a leading ``_`` as "no label"."""
    plain = visible(html.unescape(text)).replace("$", r"\$")
    return f"\u200b{plain}" if plain.startswith("_") else plain
