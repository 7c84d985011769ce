"""Draw the dashboards locally: the same panels over the run folders, in one page, without W&B."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go

from analysis.comparison.document import Document
from analysis.comparison.sets import Arm, ComparisonSet, flatten
from analysis.dashboards.definition import Panel, Scope, Section, sections_of
from analysis.pages import theme
from analysis.pages.figures import MAX_POINTS, Plot, colour, figure, line
from analysis.runs.curves import AXES, AXIS_TITLES, mean_curve, thinned
from analysis.runs.reading import number
from analysis.runs.run import LoadedRun

HEIGHT = 240
MOST_COMPARED = 12
"""Most runs side by side on a page; W&B shows ten."""
_AXIS_OF = {metric: axis for axis, metric in AXES.items()}


def render(document: Document, scope: Scope) -> str:
    """Return the page; lines and bars are means over the seeds of an arm, bands and whiskers their range."""
    titles = dict(scope.sets)
    shown = [judged.comparison for judged in document.sets if judged.comparison.key in titles]
    place = f"{scope.entity}/{scope.project}" if scope.entity else scope.project
    return theme.render(
        "preview.html.j2",
        "analysis.dashboards",
        style="preview.css",
        title=place,
        scope=f"Project {place}, grouped by {', '.join(f'config.{key}' for key in scope.group_by)}; "
        "seeds folded to mean and range.",
        sets=[_set(comparison, scope, f"set{index}") for index, comparison in enumerate(shown)],
    )


def panel_plot(panel: Panel, comparison: ComparisonSet, key: str) -> Plot | None:
    """Draw one panel over one set; None if no run recorded its metrics."""
    traces, axes = _bars(panel, comparison) if panel.kind == "bar" else _lines(panel, comparison)
    if not traces:
        return None
    built = figure(traces, margin={"l": 52, "r": 8, "t": 8, "b": 40}, **axes)
    return Plot(key, panel.title, "", built, HEIGHT)


def _set(comparison: ComparisonSet, scope: Scope, key: str) -> dict[str, Any]:
    sections = [
        _section(section, comparison, f"s{index}") for index, section in enumerate(sections_of(scope))
    ]
    plots = [plot for section in sections for plot in section["plots"]]
    return {
        "key": key,
        "title": comparison.title,
        "arms": [arm.label for arm in comparison.arms],
        "sections": sections,
        "data": theme.plot_data(key, plots),
    }


def _section(section: Section, comparison: ComparisonSet, key: str) -> dict[str, Any]:
    drawn = {
        panel: panel_plot(panel, comparison, f"{key}p{index}")
        for index, panel in enumerate(section.panels)
        if panel.kind != "comparer"
    }
    compared = comparison.runs[:MOST_COMPARED] if len(drawn) < len(section.panels) else []
    return {
        "name": section.name,
        "plots": [plot for plot in drawn.values() if plot is not None],
        "empty": [key for panel, plot in drawn.items() if plot is None for key in panel.y],
        "runs": [run.where for run in compared],
        "difference": _difference(compared),
    }


def _lines(panel: Panel, comparison: ComparisonSet) -> tuple[list[Any], dict[str, Any]]:
    traces: list[Any] = []
    axis = _AXIS_OF[panel.x]
    for index, arm in enumerate(comparison.arms):
        for metric in panel.y:
            # An unfinished run would end the mean of the others at its last step.
            curve = mean_curve([run for run in arm.finished or arm.runs if metric in run.metrics], metric)
            if curve is None or axis not in curve.x:
                continue
            keep = thinned(curve.mean, MAX_POINTS)
            x = curve.x[axis][keep]
            shared = {
                "legendgroup": arm.label,
                "meta": {"arm": index},
                "hoverinfo": "skip",
                "showlegend": False,
            }
            if curve.seeds > 1:
                edge: dict[str, Any] = {"width": 0}
                traces.append(go.Scatter(x=x, y=curve.low[keep], mode="lines", line=edge, **shared))
                traces.append(
                    go.Scatter(
                        x=x,
                        y=curve.high[keep],
                        mode="lines",
                        line=edge,
                        fill="tonexty",
                        fillcolor=_faint(colour(index)),
                        **shared,
                    )
                )
            traces.append(
                go.Scatter(
                    x=x,
                    y=curve.mean[keep],
                    mode="lines" if len(x) > 1 else "markers",
                    line=line(index, 1.8),
                    marker={"color": colour(index)},
                    name=arm.label,
                    legendgroup=arm.label,
                    meta={"arm": index},
                )
            )
    scale = {"type": "log"} if panel.log_y else {}
    title = {"title": {"text": AXIS_TITLES[axis]}}
    return traces, {"xaxis": title, "yaxis": scale, "showlegend": False}


def _bars(panel: Panel, comparison: ComparisonSet) -> tuple[list[Any], dict[str, Any]]:
    traces: list[Any] = []
    for index, arm in enumerate(comparison.arms):
        values = {metric: _last(arm, metric) for metric in panel.y}
        values = {metric: per_run for metric, per_run in values.items() if per_run}
        if values:
            means = [float(np.mean(per_run)) for per_run in values.values()]
            whiskers = {
                "type": "data",
                "symmetric": False,
                "array": [max(f) - m for f, m in zip(values.values(), means, strict=True)],
                "arrayminus": [m - min(f) for f, m in zip(values.values(), means, strict=True)],
            }
            heads = [arm.label] if len(panel.y) == 1 else list(values)
            look = {"marker": {"color": colour(index)}, "name": arm.label, "meta": {"arm": index}}
            traces.append(go.Bar(y=heads, x=means, error_x=whiskers, orientation="h", **look))
    # Losses are close together and far from 0: bars from 0 would all look the same.
    values = [x for trace in traces for x in trace.x]
    close = panel.y[0].endswith("loss") and len(values) > 1
    margin = 0.5 * (max(values) - min(values)) + 0.01 if close else 0.0
    limits = {"range": [min(values) - margin, max(values) + margin]} if close else {}
    return traces, {
        "showlegend": False,
        "xaxis": limits,
        "yaxis": {"autorange": "reversed", "automargin": True},
    }


def _last(arm: Arm, metric: str) -> list[float]:
    """Return the last value of a metric for every run that has one."""
    return [value for run in arm.runs if math.isfinite(value := _value(run, metric))]


def _value(run: LoadedRun, metric: str) -> float:
    logged = run.metrics.get(metric)
    finite = logged[np.isfinite(logged)] if logged is not None else np.empty(0)
    return float(finite[-1]) if len(finite) else number(run.summary.get(metric))


def _faint(hexadecimal: str) -> str:
    red, green, blue = (int(hexadecimal[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},0.18)"


def _difference(runs: Sequence[LoadedRun]) -> list[tuple[str, list[str]]]:
    """Return the configuration keys with more than one value, one value per run."""
    configs = [{key: str(value) for key, value in flatten(run.config).items()} for run in runs]
    keys = dict.fromkeys(key for config in configs for key in config)
    table = [(key, [config.get(key, "–") for config in configs]) for key in keys]
    return [(key, values) for key, values in table if len(set(values)) > 1]
