"""The workspace of the studies: its file is what the code makes; one command creates it, and the same updates it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from analysis.dashboards import studies
from analysis.dashboards.definition import SECTIONS
from analysis.results.studies import STUDIES
from analysis.tuning import arguments
from tests.analysis.dashboards.server import Server

DOCS = Path(__file__).resolve().parents[3] / "docs"


def test_the_definition_shows_the_runs_on_fresh_seeds_by_study_and_arm() -> None:
    spec = studies.to_definition(("team", "p"))["workspace"]["spec"]["section"]
    (runs,) = spec["runSets"]
    filters = {f["key"]["name"]: f["value"] for f in runs["filters"]["filters"]}
    names = [study.name for study in STUDIES]
    assert filters == {"jobType": "train", "group": names}
    assert not {arguments.read(["adamw", f"group={name}"]).trials_group for name in names} & set(names)
    assert [key["name"] for key in runs["grouping"]] == [
        "group.value",
        "optimizer.value.name",
        "optimizer.value.rank",
        "optimizer.value.refresh_interval",
    ]
    made = [panel for section in spec["panelBankConfig"]["sections"] for panel in section["panels"]]
    assert len(made) == sum(len(section.panels) for section in SECTIONS)


def test_the_file_in_the_documentation_is_the_definition() -> None:
    content = json.loads((DOCS / studies.FILE).read_text())
    assert content.pop("saved") == {}
    assert content == studies.to_definition()


def test_one_command_creates_the_workspace_and_the_same_updates_it(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "w.json"
    for _ in range(2):
        assert studies.main(["team/optbench", "--out", str(out)]) == 0
    (view,) = server.views.values()
    assert (view["type"], view["entityName"], view["projectName"]) == ("project-view", "team", "optbench")
    assert view["displayName"] == studies.NAME
    saved = json.loads(view["spec"]) if isinstance(view["spec"], str) else view["spec"]
    assert (
        saved["section"]["runSets"] == json.loads(out.read_text())["workspace"]["spec"]["section"]["runSets"]
    )
    assert "W&B workspace: http" in capsys.readouterr().out
    assert studies.main(["team/another", "--out", str(out)]) == 0
    assert len(server.views) == 2, "of another project"


def test_without_a_login_only_the_file_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    out = tmp_path / "w.json"
    assert studies.main(["team/p", "--out", str(out)]) == 2
    assert "WANDB_MODE is not online" in capsys.readouterr().err
    assert json.loads(out.read_text())["project"] == "p"
    for bad in ("p", "team/", "a/b/c"):
        assert studies.main([bad, "--out", str(out)]) == 2
        assert "allowed: ENTITY/PROJECT" in capsys.readouterr().err


def test_a_missing_library_is_named_with_its_installation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing(*_: Any) -> None:
        raise ModuleNotFoundError("No module named 'wandb_workspaces'", name="wandb_workspaces")

    monkeypatch.delitem(sys.modules, "analysis.dashboards.workspace", raising=False)
    import analysis.dashboards

    monkeypatch.delattr(analysis.dashboards, "workspace", raising=False)

    class Blocked:
        def find_spec(self, name: str, *_: Any) -> None:
            if name.split(".")[0] == "wandb_workspaces":
                missing()

    kept = {name: sys.modules[name] for name in list(sys.modules) if name.split(".")[0] == "wandb_workspaces"}
    for name in kept:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Blocked(), *sys.meta_path])
    assert studies.main(["--out", str(tmp_path / "w.json")]) == 2
    assert "pip install 'wandb-workspaces" in capsys.readouterr().err
