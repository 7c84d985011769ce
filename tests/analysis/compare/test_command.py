"""`optbench compare` and `optbench report` from their words to their exit codes.

Runs are trained by a stand-in for the launcher; all else (composition, checks, data, identity, statistics, report)
is real. One test starts real processes.
"""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from analysis.compare import command
from analysis.pages import screenshot
from analysis.report import command as report_command
from harness.errors import InputError
from harness.jobs import launch
from tests.analysis import synthetic
from tests.analysis.stand_in import SMALL, Launcher
from tests.harness import warm


@pytest.fixture
def launcher(monkeypatch: pytest.MonkeyPatch) -> Launcher:
    fake = Launcher()
    monkeypatch.setattr(launch, "start", fake.start)
    monkeypatch.setattr(screenshot, "browser", lambda: None)
    return fake


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    return ["adamw", "sumo", "seeds=2", "group=g", f"runs_dir={tmp_path / 'runs'}", *SMALL]


def test_optimizers_take_turns_and_the_report_comes_last(
    launcher: Launcher, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(words) == 0
    assert launcher.started == ["adamw-seed0", "sumo-seed0", "adamw-seed1", "sumo-seed1"]
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == str(tmp_path / "runs" / "g" / "report.html")
    assert "Chromium" in lines[-2]
    assert any(line.startswith("[1/4] adamw-seed0") for line in lines)
    origin = json.loads((tmp_path / "runs" / "g" / "compare.json").read_text())
    assert origin["optimizers"] == ["adamw", "sumo"]
    assert origin["commands"][0].startswith("optbench compare adamw sumo seeds=2")


def test_json_is_the_only_thing_on_standard_output(
    launcher: Launcher, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main([*words, "--json"]) == 0
    out, err = capsys.readouterr()
    data = json.loads(out)
    assert {"schema_version", "runs", "comparison", "warnings"} <= set(data)
    assert len(data["runs"]) == 4
    assert "[1/4]" in err


def test_a_failed_arm_stays_as_a_row_and_the_rest_goes_on(
    launcher: Launcher, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    launcher.fate = {
        "adamw-seed0": "diverged",
        "sumo-seed0": "vanished",
        "adamw-seed1": InputError("optimizer.rank", 500, "is larger than a side"),
    }
    assert command.main([*words, "--json"]) == 3
    assert len(launcher.started) == 4
    runs = {run["folder"]: run for run in json.loads(capsys.readouterr().out)["runs"]}
    assert {name: run["state"] for name, run in runs.items()} == {
        "adamw-seed0": "diverged",
        "sumo-seed0": "failed",
        "adamw-seed1": "failed",
        "sumo-seed1": "finished",
    }
    assert "larger than a side" in runs["adamw-seed1"]["reason"]


@pytest.mark.parametrize("end", ["interrupted", KeyboardInterrupt()])
def test_an_interruption_stops_reports_and_is_completed_by_the_same_command(
    launcher: Launcher, words: list[str], end: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    launcher.fate = {"sumo-seed0": end}
    assert command.main(words) == 75
    assert launcher.started == ["adamw-seed0", "sumo-seed0"]
    assert "group=g resumes from here" in capsys.readouterr().out
    assert (tmp_path / "runs" / "g" / "report.html").exists()
    folder = tmp_path / "runs" / "g" / "sumo-seed0"
    if folder.exists():  # the launcher's own folder would go on as a second attempt; the stand-in writes anew
        folder.rename(folder.with_name(".sumo-seed0.attempt1"))
    launcher.fate, launcher.started = {}, []
    assert command.main(words) == 0
    assert launcher.started == ["sumo-seed0", "adamw-seed1", "sumo-seed1"]


def test_arms_can_be_added_later(launcher: Launcher, words: list[str], tmp_path: Path) -> None:
    assert command.main(words) == 0
    launcher.started.clear()
    assert command.main(["muon", *words[1:]]) == 0
    assert launcher.started == ["muon-seed0", "muon-seed1"]
    origin = json.loads((tmp_path / "runs" / "g" / "compare.json").read_text())
    assert origin["optimizers"] == ["adamw", "sumo", "muon"]
    assert len(origin["commands"]) == 2


def test_other_settings_in_the_same_group_are_refused(launcher: Launcher, words: list[str]) -> None:
    assert command.main(words) == 0
    launcher.started.clear()
    with pytest.raises(InputError, match=r"steps"):
        command.main([word.replace("steps=20", "steps=30") for word in words])
    assert launcher.started == []


@pytest.mark.parametrize(
    "bad", ["sumo.rnak=3", "sumo.rank=100000", "stesp=5", "batch_size=0", "model=llama_tinny"]
)
def test_bad_input_of_any_arm_starts_nothing_and_leaves_nothing(
    launcher: Launcher, words: list[str], bad: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError):
        command.main([*words, bad])
    assert launcher.started == []
    assert not (tmp_path / "runs").exists()


def test_report_of_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str], launcher: Launcher) -> None:
    synthetic.group(tmp_path / "runs", seeds=[0, 1])
    assert report_command.main([str(tmp_path / "runs"), "--out", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(tmp_path / "out" / "report.html")
    assert report_command.main([str(tmp_path / "runs"), "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["runs"]) == 8


def test_an_empty_folder_is_reported_as_such(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], launcher: Launcher
) -> None:
    (tmp_path / "notes.csv").write_text("a,b\n1,2\n")
    assert report_command.main([str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "There are no runs below this folder: nothing is compared." in lines
    assert any(line.startswith("! notes.csv is not read") for line in lines)
    assert lines[-1] == str(tmp_path / "report.html")
    assert report_command.main([str(tmp_path), "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert (data["runs"], data["comparison"]["sets"]) == ([], [])
    assert [warning["code"] for warning in data["warnings"]] == ["remark", "no_runs"]
    for name in ("report.html", "comparison.md", "comparison.csv", "comparison.json"):
        assert (tmp_path / name).is_file()
    assert (tmp_path / "comparison.md").read_text().startswith("There are no runs")


def test_a_report_of_reports_does_not_grow(tmp_path: Path, launcher: Launcher) -> None:
    """The files of a report in the same folder are not runs."""
    synthetic.group(tmp_path, seeds=[0])
    for _ in range(2):
        assert report_command.main([str(tmp_path)]) == 0
    assert len(json.loads((tmp_path / "comparison.json").read_text())["runs"]) == 4


def test_the_commands_import_no_torch() -> None:
    import subprocess

    code = "import sys, analysis.compare.sessions, analysis.report.report; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.launch
def test_real_runs_end_in_a_report(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHROMIUM", "none")
    small = [word.replace("seeds=2", "seeds=1").replace("steps=20", "steps=3") for word in words]
    done = warm.run("compare", *small, "sumo.rank=16", "--json")
    assert done.returncode == 0, done.stderr
    data = json.loads(done.stdout)
    assert [run["state"] for run in data["runs"]] == ["finished", "finished"]
    (comparison,) = data["comparison"]["sets"]
    assert comparison["verdict"]["kind"] == "one_seed"
    state = {row["optimizer"]: row["state"] for row in comparison["table"]["rows"]}
    assert state["sumo"] < state["adamw"]
