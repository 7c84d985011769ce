"""Damaged, old, half-written and foreign run folders: each opens, and says what is wrong with it."""

import json
import math
from pathlib import Path

import pytest
from plotly.offline import get_plotlyjs

from analysis.comparison import document
from analysis.comparison.sets import group_into_sets
from analysis.report import report_page
from analysis.runs.loading import load
from analysis.runs.run import LoadedRun
from harness.errors import InputError
from tests.analysis import synthetic
from tests.analysis.synthetic import Recipe


def only(root: Path) -> LoadedRun:
    (run,) = load(root)
    return run


def edit(path: Path, **changes: object) -> None:
    data = json.loads(path.read_text())
    path.write_text(json.dumps({**data, **changes}))


def test_a_whole_run_is_read_without_a_note(tmp_path: Path) -> None:
    synthetic.write(tmp_path, Recipe("sumo", seed=7))
    run = only(tmp_path)
    assert run.notes == []
    assert (run.optimizer, run.seed, run.state, run.where) == ("sumo", 7, "finished", "sumo-seed7")
    assert run.final_loss == run.metrics["val/loss"][-1]
    assert len(run.moments)
    assert len(run.parameters)


def test_a_run_folder_itself_can_be_given(tmp_path: Path) -> None:
    assert only(synthetic.write(tmp_path, Recipe())).where == "adamw-seed0"


def test_nested_groups_are_found_and_replaced_runs_are_not(tmp_path: Path) -> None:
    synthetic.write(tmp_path / "a" / "b", Recipe())
    synthetic.write(tmp_path, Recipe(), name=".adamw-seed0.replaced-20260101")
    assert [run.where for run in load(tmp_path)] == ["a/b/adamw-seed0"]


def test_a_folder_that_does_not_exist_is_bad_input(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not a folder"):
        load(tmp_path / "missing")


def test_an_empty_folder_holds_no_runs(tmp_path: Path) -> None:
    assert load(tmp_path) == []


def test_a_run_that_goes_on_is_not_over_though_an_older_summary_lies_there(tmp_path: Path) -> None:
    folder = synthetic.write(tmp_path, Recipe(state="interrupted", stop_at=60))
    assert only(tmp_path).state == "interrupted"
    edit(folder / "status.json", state="running")
    assert only(tmp_path).state == "running"


def test_a_killed_run_keeps_what_it_wrote(tmp_path: Path) -> None:
    folder = synthetic.write(tmp_path, Recipe(state="running", stop_at=60))
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 70, "train/lo')
    run = only(tmp_path)
    assert (run.state, run.finished, run.steps) == ("running", False, 60)
    assert math.isnan(run.final_loss)
    assert any("torn" in note for note in run.notes)
    assert any("no summary.json" in note for note in run.notes)


def test_a_killed_run_is_placed_beside_its_equals(tmp_path: Path) -> None:
    synthetic.group(tmp_path, ["adamw", "sumo"], [0, 1])
    killed = {"seed": 2, "state": "running", "stop_at": 60}
    synthetic.write(tmp_path, Recipe(**{**vars(synthetic.TYPICAL["sumo"]), **killed}))
    (chosen,) = group_into_sets(load(tmp_path))
    assert [(arm.optimizer, len(arm.runs)) for arm in chosen.arms] == [("adamw", 2), ("sumo", 3)]


def test_losses_that_are_not_finite_become_a_note(tmp_path: Path) -> None:
    folder = synthetic.write(tmp_path, Recipe())
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    rows[3]["train/loss"] = None
    rows[4]["train/loss"] = math.nan
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = only(tmp_path)
    assert "train/loss is not finite in 2 rows" in run.notes
    assert run.finished


@pytest.mark.parametrize("loss", [None, math.nan, math.inf, "3.2", True])
def test_finished_without_a_finite_loss_counts_as_failed(tmp_path: Path, loss: object) -> None:
    folder = synthetic.write(tmp_path, Recipe())
    edit(folder / "summary.json", **{"val/loss": loss})
    run = only(tmp_path)
    assert (run.state, run.finished) == ("failed", False)
    assert any("counts as failed" in note for note in run.notes)


@pytest.mark.parametrize("version", [0, 99])
def test_another_schema_version_is_said(tmp_path: Path, version: int) -> None:
    folder = synthetic.write(tmp_path, Recipe())
    edit(folder / "summary.json", schema_version=version)
    assert any(f"schema {version}" in note for note in only(tmp_path).notes)


def test_an_older_summary_may_lack_keys(tmp_path: Path) -> None:
    folder = synthetic.write(tmp_path, Recipe())
    kept = {"schema_version": 0, "state": "finished", "optimizer": "adamw", "seed": 0, "val/loss": 3.4}
    (folder / "summary.json").write_text(json.dumps(kept))
    run = only(tmp_path)
    assert run.finished
    assert math.isnan(run.fact("state_bytes", "moment"))
    assert run.comparison_key.startswith("config:")


@pytest.mark.parametrize(
    "name",
    ["config.yaml", "summary.json", "status.json", "environment.json", "parameters.json", "moments.parquet"],
)
@pytest.mark.parametrize("content", [b"", b"{", b"[1, 2]", b"\xff\xfe\x00nonsense: ["])
def test_any_damaged_file_costs_a_note_only(tmp_path: Path, name: str, content: bytes) -> None:
    folder = synthetic.write(tmp_path, Recipe())
    (folder / name).write_bytes(content)
    assert any(name in note for note in only(tmp_path).notes)


def test_steps_logged_twice_hold_once(tmp_path: Path) -> None:
    folder = synthetic.write(tmp_path, Recipe())
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 100, "train/loss": 1.0}) + "\n")
    run = only(tmp_path)
    steps = run.metrics["step"].tolist()
    assert steps == sorted(set(steps))
    assert run.metrics["train/loss"][steps.index(100)] == 1.0
    assert any("logged twice" in note for note in run.notes)


def test_step_time_is_a_mean_weighted_by_steps(tmp_path: Path) -> None:
    """10 steps at 1 ms and one at 100 ms: 110/11 = 10 ms; a median over rows would say 50."""
    folder = synthetic.write(tmp_path, Recipe())
    rows = [(1, 9.0), (11, 0.001), (12, 0.1)]
    text = "".join(json.dumps({"step": step, "time/optimizer_s": time}) + "\n" for step, time in rows)
    (folder / "metrics.jsonl").write_text(text)
    assert only(tmp_path).time("optimizer") == pytest.approx(0.01, rel=1e-12)


def test_a_foreign_run_needs_two_files(tmp_path: Path) -> None:
    folder = tmp_path / "theirs"
    folder.mkdir()
    facts = {"optimizer": "soap", "seed": 0, "state": "finished", "comparison_key": "k", "val/loss": 3.1}
    (folder / "summary.json").write_text(json.dumps(facts))
    (folder / "metrics.jsonl").write_text('{"step": 1, "val/loss": 5}\n{"step": 2, "val/loss": 3.1}\n')
    run = only(tmp_path)
    assert run.finished
    assert (run.optimizer, run.comparison_key) == ("soap", "k")
    assert "config.yaml is missing" in run.notes


def test_two_hundred_runs_make_one_page(tmp_path: Path) -> None:
    synthetic.group(tmp_path, seeds=range(50), has_moments=False, log_every=50)
    found = document.judge_folder(tmp_path)
    (judged,) = found.sets
    assert len(judged.comparison.runs) == 200
    assert judged.comparison.results.shape == (4, 50)
    page = report_page.render(found)
    assert "50 common seeds" in page
    assert len(page) < len(get_plotlyjs()) + 1_500_000
