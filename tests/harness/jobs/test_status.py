"""`optbench status` from folders alone: every state that a run can be left in."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from harness import cli
from harness.config.schema import RunConfig
from harness.jobs import grid, slurm, status
from harness.jobs.grid import GridRow
from harness.jobs.slurm import ArrayTask
from harness.jobs.submission import Submission, add_event
from harness.record.folder import RunFolder


@pytest.fixture(autouse=True)
def queue(monkeypatch: pytest.MonkeyPatch) -> dict[str, ArrayTask]:
    """What SLURM would say; nothing, unless a test puts it in."""
    known: dict[str, ArrayTask] = {}
    monkeypatch.setattr(slurm, "tasks", lambda jobs: {job: known[job] for job in jobs if job in known})
    return known


def _run(root: Path, name: str, state: str | None, reason: str = "", step: int = 7) -> Path:
    """A run folder as a run that ended in this state leaves it; None: none yet."""
    path = root / "g" / name
    if state is None:
        path.mkdir(parents=True)
        return path
    folder = RunFolder(path, RunConfig(steps=9, world_size=1, micro_batch_size=1), "id")
    folder.begin(0)
    folder.add_row({"step": 5, "train/loss": 2.5, "throughput/tokens_per_s": 100.0})
    folder.add_row({"step": 7, "train/loss": 2.25, "val/loss": 3.5})
    folder.set_state(state, step=step, reason=reason)
    folder.close()
    if state == "finished":
        (path / "DONE").touch()
    return path


def _beat(run: Path, step: int, age_s: float) -> None:
    (run / "heartbeat").mkdir()
    path = run / "heartbeat" / "rank_00000.json"
    path.write_text(json.dumps({"step": step, "where": "harness/loop.py:3 train"}))
    then = time.time() - age_s
    os.utime(path, (then, then))


def _one(root: Path) -> status.RunStatus:
    (found,), _ = status.collect(root)
    return found


def test_without_slurm(tmp_path: Path) -> None:
    for state in ("finished", "failed", "diverged", "interrupted"):
        _run(tmp_path, state, state, "because")
    runs, jobs = status.collect(tmp_path)
    assert [(run.name, run.state, run.reason) for run in runs] == [
        (f"g/{state}", state, "because") for state in ("diverged", "failed", "finished", "interrupted")
    ]
    assert jobs == []
    assert (runs[0].step, runs[0].steps, runs[0].loss, runs[0].tokens_per_s) == (7, 9, 2.25, 100.0)


def test_running_is_what_shows_signs_of_life_and_the_rest_is_dead(tmp_path: Path) -> None:
    run = _run(tmp_path, "a", "running")
    _beat(run, 8, age_s=1)
    assert (_one(tmp_path).state, _one(tmp_path).step) == ("running", 8)
    then = time.time() - 100
    os.utime(run / "heartbeat" / "rank_00000.json", (then, then))
    found = _one(tmp_path)
    assert found.state == "dead"
    assert found.reason.startswith("no sign of life for 9")
    assert found.reason.endswith("since step 8 (harness/loop.py:3 train)")


def test_a_job_that_waits_runs_and_waits_again(tmp_path: Path, queue: dict[str, ArrayTask]) -> None:
    run = _run(tmp_path, "a", None)
    jobs = Submission(run)
    jobs.path.mkdir()
    jobs.add("12", "train", jobs.path / "submit.sbatch")
    queue["12"] = ArrayTask("PENDING", "Priority", 0, "")
    assert (_one(tmp_path).state, _one(tmp_path).reason) == ("pending", "waits: Priority")
    queue["12"] = ArrayTask("RUNNING", "", 0, "node[1-2]")
    assert (_one(tmp_path).state, _one(tmp_path).nodes) == ("starting", "node[1-2]")
    add_event(run, "12", 0, "requeued", "after step 7")
    queue["12"] = ArrayTask("PENDING", "BeginTime", 1, "")
    assert (_one(tmp_path).state, _one(tmp_path).reason) == ("requeued", "after step 7; waits: BeginTime")
    del queue["12"]
    found = _one(tmp_path)
    assert (found.state, found.reason) == ("failed", "job 12 left no run: no longer known to SLURM")


@pytest.mark.parametrize(
    ("kind", "own", "state"),
    [
        ("cancelled", "interrupted", "cancelled"),
        ("stopped", "interrupted", "stopped"),
        ("failed", "diverged", "diverged"),
        ("failed", "interrupted", "failed"),
        ("finished", "finished", "finished"),
        ("resubmitted", "interrupted", "requeued"),
        ("ended", "interrupted", "interrupted"),
    ],
)
def test_what_the_batch_script_noted_is_told_long_after_slurm_forgot(
    kind: str, own: str, state: str, tmp_path: Path
) -> None:
    run = _run(tmp_path, "a", own)
    add_event(run, "12", 0, "started", "attempt 1")
    add_event(run, "12", 0, kind, "after step 7")
    assert _one(tmp_path).state == state


def test_signs_of_life_of_the_attempt_before_are_not_this_one_s(
    tmp_path: Path, queue: dict[str, ArrayTask]
) -> None:
    run = _run(tmp_path, "a", "interrupted")
    _beat(run, 8, age_s=3)
    add_event(run, "9", 0, "cancelled", "after step 8")
    jobs = Submission(run)
    jobs.add("12", "train", jobs.path / "submit.sbatch")
    queue["12"] = ArrayTask("RUNNING", "", 1, "node1")
    assert _one(tmp_path).state == "starting", "its script has not even begun"
    add_event(run, "12", 1, "started", "attempt 2")
    assert _one(tmp_path).state == "starting"
    os.utime(run / "heartbeat" / "rank_00000.json", (time.time() + 1, time.time() + 1))
    assert _one(tmp_path).state == "running"


def test_an_older_job_says_nothing_about_a_newer_one(tmp_path: Path, queue: dict[str, ArrayTask]) -> None:
    run = _run(tmp_path, "a", "interrupted")
    add_event(run, "9", 0, "cancelled", "after step 7")
    jobs = Submission(run)
    jobs.add("12", "train", jobs.path / "submit.sbatch")
    queue["12"] = ArrayTask("PENDING", "Priority", 0, "")
    assert (_one(tmp_path).job, _one(tmp_path).state) == ("12", "pending")


def test_rows_of_a_grid_show_before_they_have_a_folder(tmp_path: Path, queue: dict[str, ArrayTask]) -> None:
    group = tmp_path / "g"
    submission = Submission(group)
    submission.path.mkdir(parents=True)
    rows = [GridRow(("a=1",), number, f"r{number}", f"/elsewhere/g/r{number}", "id") for number in range(3)]
    grid.write(submission.path / grid.FILE, rows)
    submission.add("12", "sweep", submission.path / "sweep.sbatch", [0, 2])
    submission.add("13", "report", submission.path / "report.sbatch")
    queue["12_0"] = ArrayTask("RUNNING", "", 0, "node1")
    queue["12_2"] = ArrayTask("PENDING", "JobArrayTaskLimit", 0, "")
    queue["13"] = ArrayTask("PENDING", "Dependency", 0, "")
    runs, jobs = status.collect(tmp_path)
    assert [(run.name, run.job, run.state) for run in runs] == [
        ("g/r0", "12_0", "starting"),
        ("g/r2", "12_2", "pending"),
    ]
    assert [(job.job, job.command, job.state) for job in jobs] == [("13", "report", "pending")]


def test_rows_of_an_array_in_scontrol_s_lines() -> None:
    found: dict[str, ArrayTask] = {}
    for line in (
        "JobId=12 ArrayJobId=12 ArrayTaskId=1-2,5%4 JobName=a JobState=PENDING Reason=Resources Restarts=0 NodeList=",
        "JobId=15 ArrayJobId=12 ArrayTaskId=0 JobName=a JobState=RUNNING Reason=None Restarts=2 NodeList=node[1-2]",
        "JobId=16 JobName=b JobState=CANCELLED Reason=None Restarts=0 NodeList=(null)",
    ):
        found |= slurm._tasks_of_line(line)
    assert sorted(found) == ["12_0", "12_1", "12_2", "12_5", "16"]
    assert found["12_0"] == ArrayTask("RUNNING", "", 2, "node[1-2]")
    assert found["12_5"] == ArrayTask("PENDING", "Resources", 0, "")
    assert found["16"].is_over
    assert not found["12_5"].is_over


def test_the_command_and_its_refusals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _run(tmp_path, "a", "finished", "all steps done")
    assert cli.main(["status", str(tmp_path)]) == 0
    assert "g/a" in (text := capsys.readouterr().out)
    assert "7/9" in text
    assert cli.main(["status", str(tmp_path), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["schema_version"] == 1
    assert document["runs"][0] | {"folder": ""} == {
        "name": "g/a",
        "folder": "",
        "state": "finished",
        "step": 7,
        "steps": 9,
        "loss": 2.25,
        "val_loss": 3.5,
        "tokens_per_s": 100.0,
        "restarts": 0,
        "reason": "all steps done",
        "job": None,
        "nodes": "",
        "problems": [],
    }
    for words, said in (
        (["--cancel", "a"], "is finished: there is no job to cancel"),
        (["--resubmit", "a"], "is finished: there is nothing to do"),
        (["--cancel", "b"], "--cancel: b is not a run here"),
        (["--cancle", "a"], "did you mean --cancel?"),
        (["--cancel"], "--cancel: needs a value"),
    ):
        assert cli.main(["status", str(tmp_path), *words]) == 2
        assert said in capsys.readouterr().err
    assert cli.main(["status", str(tmp_path / "no")]) == 2
    assert "is not a folder" in capsys.readouterr().err
