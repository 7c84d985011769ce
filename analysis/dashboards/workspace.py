"""Turn the definition into W&B's objects: a workspace and a report, made without a network."""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Iterator
from typing import Any

import wandb_workspaces.expr as expr
import wandb_workspaces.reports.v2.interface as wr
import wandb_workspaces.workspaces as ws

from analysis.comparison import results_table
from analysis.comparison.document import Document
from analysis.dashboards.definition import COLUMNS, OPTIMIZER, Panel, Scope, Section, sections_of
from harness.visible import visible

LONGEST_TITLE = 128
MOST_RUNS = 100
"""Runs per panel, where the seeds of an arm are one curve."""
WIDTH, HEIGHT, PER_ROW = 8, 6, 3
"""A panel of a report, in W&B's grid of 24 columns."""


def workspace(scope: Scope, name: str) -> ws.Workspace:
    """Build the workspace: panels by section over runs grouped by arm, with seeds as mean and range."""
    runs: Any = ws.RunsetSettings(
        filters=_filters(scope, [key for key, _ in scope.sets]),
        groupby=[expr.Config(key) for key in scope.group_by],
        order=[expr.Ordering(expr.Summary("val/loss"), ascending=True)],
        # Colours of nested groups would have to name every option; W&B chooses those.
        group_colors=dict(scope.colours) if scope.group_by == (OPTIMIZER,) else {},
        pinned_columns=[
            *(f"config:{_wrapped(key)}" for key in scope.group_by),
            "config:seed.value",
            *(f"summary:{key}" for key in (*scope.metrics, *COLUMNS)),
        ],
    )
    sections: list[Any] = [
        ws.Section(name=section.name, panels=_panels(section), is_open=True, pinned=index == 0)
        for index, section in enumerate(sections_of(scope))
    ]
    built = ws.Workspace(
        name=title(name),
        entity=scope.entity or "",
        project=scope.project,
        sections=sections,
        settings=ws.WorkspaceSettings(x_axis="step", max_runs=MOST_RUNS),
        runset_settings=runs,
        auto_generate_panels=False,
    )
    built._internal_runset_id = _identifier("runs", scope.project, *scope.groups)
    return built


def report(scope: Scope, document: Document, name: str, *, online: bool) -> wr.Report:
    """Build the report: verdict, table and panels of each set.

    Args:
        scope: with an entity if ``online``.
        document: the judged runs, with paths redacted.
        name: its title.
        online: let W&B look up the project; offline, its run sets name none.
    """
    blocks: list[Any] = [wr.TableOfContents()]
    titles = dict(scope.sets)
    for judged in document.sets:
        key = judged.comparison.key
        if key not in titles:
            continue
        blocks += [wr.H1(visible(judged.comparison.title)), wr.P(visible(judged.verdict.headline))]
        if judged.verdict.detail:
            blocks.append(wr.P(visible(judged.verdict.detail)))
        blocks += [
            wr.P(visible(f"Warning: {warning.message}")) for warning in judged.warnings if warning.severe
        ]
        blocks.append(wr.MarkdownBlock(text=results_table.markdown([(judged.table, judged.verdict.scope)])))
        for section in sections_of(scope):
            panels = _panels(section, places=True, salt=key)
            blocks += [
                wr.H2(section.name),
                wr.PanelGrid(runsets=[_runset(scope, key, online)], panels=panels),
            ]
    return wr.Report(
        project=scope.project,
        entity=scope.entity or "",
        title=title(name),
        description="Written by optbench report --wandb; the same comparison in detail is its artifact report.html.",
        blocks=blocks,
        width="fluid",
    )


def title(text: str) -> str:
    """Return a name that W&B accepts: no symbols (emojis, ``+``, ``=``), no control characters, limited length."""
    kept = "".join(" " if unicodedata.category(c)[0] in "SC" else c for c in visible(text))
    return " ".join(kept.split())[:LONGEST_TITLE] or "optbench"


def to_json(saved: ws.Workspace | wr.Report) -> dict[str, Any]:
    """Return the JSON that W&B would save."""
    return json.loads(saved._to_model().model_dump_json(by_alias=True, exclude_none=True))


def _runset(scope: Scope, key: str, online: bool) -> Any:
    runset = wr.Runset(
        entity=(scope.entity or "") if online else "",
        project=scope.project if online else "",
        name="seeds of each arm",
        filters=_filters(scope, [key]),
        groupby=[f"config.{key}" for key in scope.group_by],
        order=[wr.OrderBy(wr.SummaryMetric("val/loss"), ascending=True)],
    )
    runset._id = _identifier("runset", key)
    return runset


def _filters(scope: Scope, keys: list[str]) -> Any:
    """Return filters for the comparable training runs of these groups, without sweeps and reports of the project."""
    filters: list[Any] = [expr.Metric("JobType") == "train"]
    if scope.groups:
        filters.append(expr.Metric("Group").isin(list(scope.groups)))
    if keys:
        filters.append(expr.Config("comparison_key").isin(keys))
    return expr.And(*filters)


def _panels(section: Section, *, places: bool = False, salt: str = "") -> list[Any]:
    return list(_place_panels(section, places, salt))


def _place_panels(section: Section, places: bool, salt: str) -> Iterator[Any]:
    for index, panel in enumerate(section.panels):
        drawn = _panel(panel)
        drawn._id = _identifier(section.name, panel.title, salt)
        if places:
            row, column = divmod(index, PER_ROW)
            wide = 3 * WIDTH if panel.kind == "comparer" else WIDTH
            drawn.layout = wr.Layout(x=column * WIDTH, y=row * HEIGHT, w=wide, h=HEIGHT)
        yield drawn


def _panel(panel: Panel) -> Any:
    if panel.kind == "comparer":
        return wr.RunComparer(diff_only="split")
    folded: dict[str, Any] = {"groupby_aggfunc": "mean", "groupby_rangefunc": "minmax"}
    if panel.kind == "bar":
        metrics: list[Any] = [wr.Metric(key) for key in panel.y]
        return wr.BarPlot(title=panel.title, metrics=metrics, max_runs_to_show=MOST_RUNS, **folded)
    return wr.LinePlot(
        title=panel.title,
        x=wr.Metric(panel.x),
        y=[wr.Metric(key) for key in panel.y],
        log_y=panel.log_y or None,
        smoothing_type="none",
        max_runs_to_show=MOST_RUNS,
        **folded,
    )


def _wrapped(key: str) -> str:
    """Return a configuration key in the form of W&B's table of runs: optimizer.name → optimizer.value.name."""
    head, _, rest = key.partition(".")
    return f"{head}.value.{rest}" if rest else f"{head}.value"


def _identifier(*words: str) -> str:
    """Return an identifier derived from its content, so that saving twice changes nothing (W&B's are random)."""
    return hashlib.sha256("\0".join(words).encode()).hexdigest()[:11]
