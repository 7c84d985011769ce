"""The definition: its keys exist, W&B's objects hold all of it, and runs are grouped by what makes an arm."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from analysis.comparison import document
from analysis.dashboards import definition, preview, workspace
from analysis.dashboards.definition import COLUMNS, SECTIONS, Scope
from harness.errors import InputError
from harness.record.schema import METRICS, SUMMARY_KEYS
from harness.record.wandb import X_AXES
from tests.analysis import synthetic
from tests.analysis.synthetic import Recipe

PANELS = [panel for section in SECTIONS for panel in section.panels]


def _scope(root: Path) -> Scope:
    return definition.find_scope(document.judge_folder(root), None)


def test_every_key_is_one_that_runs_record() -> None:
    for panel in PANELS:
        known = {**METRICS, **SUMMARY_KEYS} if panel.kind == "bar" else METRICS
        assert set(panel.y) <= set(known), panel
        assert panel.x in X_AXES, panel
    assert set(COLUMNS) <= {*METRICS, *SUMMARY_KEYS}
    assert {panel.x for panel in PANELS if panel.y == ("val/loss",)} >= {"tokens", "wall_s", "flops"}


def test_the_workspace_holds_every_panel_folded_over_seeds(tmp_path: Path) -> None:
    where = _scope(synthetic.group(tmp_path))
    spec = workspace.to_json(workspace.workspace(where, "name"))["spec"]["section"]
    made = [panel for section in spec["panelBankConfig"]["sections"] for panel in section["panels"]]
    assert [p["config"].get("chartTitle", "Runs side by side") for p in made] == [p.title for p in PANELS]
    for panel, saved in zip(PANELS, made, strict=True):
        kinds = {"line": "Run History Line Plot", "bar": "Bar Chart", "comparer": "Run Comparer"}
        assert saved["viewType"] == kinds[panel.kind]
        if panel.kind == "comparer":
            continue
        assert saved["config"]["metrics"] == list(panel.y)
        assert (saved["config"]["groupAgg"], saved["config"]["groupArea"]) == ("mean", "minmax")
        if panel.kind == "line":
            assert saved["config"]["xAxis"] == panel.x
            assert saved["config"].get("yLogScale", False) == panel.log_y
    (runs,) = spec["runSets"]
    assert runs["grouping"] == [{"section": "config", "name": "optimizer.value.name"}]
    filters = {f["key"]["name"]: f["value"] for f in runs["filters"]["filters"]}
    assert filters == {
        "jobType": "train",
        "group": ["synthetic"],
        "comparison_key": [key for key, _ in where.sets],
    }
    assert spec["settings"]["useRunsTableGroupingInPanels"] is True
    assert spec["settings"]["shouldAutoGeneratePanels"] is False
    assert sorted(spec["customRunColors"].values()) == sorted(colour for _, colour in where.colours)


def test_the_report_says_the_verdict_and_shows_every_panel(tmp_path: Path) -> None:
    shown = document.judge_folder(synthetic.group(tmp_path))
    where = definition.find_scope(shown, ("team", "p"))
    found = workspace.to_json(workspace.report(where, shown, "name", online=False))
    assert (found["displayName"], found["project"]) == ("name", {"name": "p", "entityName": "team"})
    blocks: list[dict[str, Any]] = found["spec"]["blocks"]
    text = json.dumps(blocks, ensure_ascii=False)
    assert shown.sets[0].verdict.headline in text
    assert "| sumo | 3.3" in text
    grids = [block["metadata"] for block in blocks if block["type"] == "panel-grid"]
    assert len(grids) == len(SECTIONS)
    made = [panel for grid in grids for panel in grid["panelBankSectionConfig"]["panels"]]
    assert len(made) == len(PANELS)
    for grid in grids:
        assert grid["runSets"][0]["grouping"] == [{"section": "config", "name": "optimizer.value.name"}]
        places = [(p["layout"]["x"], p["layout"]["y"]) for p in grid["panelBankSectionConfig"]["panels"]]
        assert len(set(places)) == len(places)
        assert all(
            p["layout"]["x"] + p["layout"]["w"] <= 24 for p in grid["panelBankSectionConfig"]["panels"]
        )


def test_the_same_comparison_makes_the_same_definition(tmp_path: Path) -> None:
    shown = document.judge_folder(synthetic.group(tmp_path))
    where = definition.find_scope(shown, None)
    for make in (
        lambda: workspace.workspace(where, "n"),
        lambda: workspace.report(where, shown, "n", online=False),
    ):
        assert workspace.to_json(make()) == workspace.to_json(make())


def test_arms_of_one_optimizer_do_not_fold_into_one_curve(tmp_path: Path) -> None:
    for rank in (32, 64):
        for seed in (0, 1):
            options = {"rank": rank, "alpha": 1.0}
            synthetic.write(tmp_path, Recipe("sumo", seed=seed, options=options), f"r{rank}-{seed}")
    where = _scope(tmp_path)
    assert where.group_by == ("optimizer.name", "optimizer.rank")
    (runs,) = workspace.to_json(workspace.workspace(where, "n"))["spec"]["section"]["runSets"]
    assert [key["name"] for key in runs["grouping"]] == ["optimizer.value.name", "optimizer.value.rank"]


def test_runs_of_two_projects_need_a_word(tmp_path: Path) -> None:
    for index, project in enumerate(("a", "b")):
        keys = {"wandb": {"project": project, "entity": None}}
        synthetic.write(tmp_path, Recipe("sumo", seed=index, overrides=keys), project)
    shown = document.judge_folder(tmp_path)
    with pytest.raises(InputError, match=r"several W&B projects; fix: .*--wandb=ENTITY/PROJECT"):
        definition.find_scope(shown, None)
    assert definition.find_scope(shown, ("team", "a")).project == "a"


def test_the_page_draws_what_was_recorded_and_names_what_was_not(tmp_path: Path) -> None:
    shown = document.judge_folder(synthetic.group(tmp_path))
    where = definition.find_scope(shown, None)
    comparison = shown.sets[0].comparison
    recorded = {key for run in shown.runs for key in run.metrics} | {"best_val_loss"}
    for panel in PANELS:
        if panel.kind == "comparer":
            continue
        plot = preview.panel_plot(panel, comparison, "k")
        assert (plot is not None) == bool(recorded & set(panel.y)), panel.title
        if plot is None:
            continue
        named = {trace["name"] for trace in plot.figure["data"] if trace.get("name")}
        assert named == {"adamw", "galore", "muon", "sumo"}
    page = preview.render(shown, where)
    for panel in PANELS:
        missing = panel.kind != "comparer" and not recorded & set(panel.y)
        assert panel.y[0] in page if missing else panel.title in page or panel.kind == "comparer", panel.title


def test_a_mean_and_its_range_are_those_of_the_seeds(tmp_path: Path) -> None:
    shown = document.judge_folder(synthetic.group(tmp_path, ["sumo"]))
    (judged,) = shown.sets
    finals = [run.final_loss for run in shown.runs]
    bar = next(panel for panel in PANELS if panel.title == "Validation loss at the last evaluation")
    plot = preview.panel_plot(bar, judged.comparison, "k")
    assert plot is not None
    (trace,) = plot.figure["data"]
    assert trace["x"] == pytest.approx([sum(finals) / 3], abs=1e-12)
    assert trace["x"][0] + trace["error_x"]["array"][0] == pytest.approx(max(finals), abs=1e-12)
    assert trace["x"][0] - trace["error_x"]["arrayminus"][0] == pytest.approx(min(finals), abs=1e-12)


@pytest.mark.parametrize("name", ["🚀 fast", "a+b=c|d $5", "👩‍👩‍👧" * 60, "x\u202e\x1b[1m", "^`~", ""])
def test_w_and_b_takes_a_group_of_any_name(tmp_path: Path, name: str) -> None:
    synthetic.group(tmp_path, ["adamw", "sumo"], [0, 1], has_moments=False, log_every=50)
    found = document.judge_folder(tmp_path)
    for run in found.runs:
        run.config["group"] = name
    where = definition.find_scope(found, None)
    made = workspace.to_json(workspace.workspace(where, f"optbench: {name}"))
    text = workspace.to_json(workspace.report(where, found, f"optbench: {name}", online=False))
    assert json.dumps([made, text]).isascii()
    assert workspace.title("plain name 3.1") == "plain name 3.1"


def test_the_metric_of_a_task_has_panels_of_its_own(tmp_path: Path) -> None:
    answers = synthetic.Answers("f1", ["no", "yes"] * 5, ["no", "yes", "yes", "no", "no"] * 2, ["no", "yes"])
    for seed in (0, 1):
        synthetic.write(tmp_path, Recipe("adamw", seed=seed, has_moments=False, answers=answers))
    where = _scope(tmp_path)
    assert where.metrics == ("val/f1",)
    first, *rest = definition.sections_of(where)
    assert tuple(rest) == SECTIONS
    assert {panel.y for panel in first.panels} == {("val/f1",)}
    spec = workspace.to_json(workspace.workspace(where, "name"))["spec"]["section"]
    assert spec["panelBankConfig"]["sections"][0]["name"] == "Task"
    assert "Validation f1 at the last evaluation" in preview.render(document.judge_folder(tmp_path), where)
