"""A tuning study on a real Slurm: trials as an array, then the job that queues the best settings on fresh seeds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from harness.jobs import submission
from harness.jobs.submission import Submission
from tests.faults.checkpoints import status
from tests.slurm.conftest import Lab

pytestmark = [pytest.mark.launch, pytest.mark.slow, pytest.mark.timeout(900)]
WAIT_S = 400


def _state(lab: Lab, job: str) -> str:
    return lab.slurm.wait(int(job), WAIT_S)["JobState"]


def _output(folder: Path) -> str:
    return "\n".join(path.read_text() for path in sorted((folder / "slurm" / "logs").glob("*.out")))


def test_trials_that_were_pushed_aside_then_the_comparison_and_its_report(lab: Lab, tmp_path: Path) -> None:
    words = [
        "sweep",
        "galore",
        "adamw",
        "trials=2",
        "seeds=1",
        "group=tuned",
        "lr=0.001,0.004",
        "galore.rank=4",
    ]
    # So many steps that the first trial still trains when the more important job comes.
    words += lab.words(
        f"runs_dir={tmp_path}", "steps=400", "eval.every=null", "moments.every=null", "engine.threads=1"
    )
    words += ["cluster.processes=1", "cluster.cpus=1", "cluster.throttle=2"]
    queued = lab.submit(*words)
    trials, home = tmp_path / "tuned-trials", tmp_path / "tuned"
    assert [row["name"] for row in queued["rows"]][:2] == ["galore-trial1", "adamw-trial1"]
    first = trials / "galore-trial1"
    lab.slurm.until(
        lambda: (first / "heartbeat").is_dir() and status(first)["step"] >= 1, WAIT_S, "the first trial"
    )
    lab.slurm.submit("-p", "hi", "--nodes=3", "--exclusive", "--output=/dev/null", "--wrap", "sleep 1")
    assert _state(lab, queued["then"][0]["job"]) == "COMPLETED", _output(trials)
    assert "requeued" in [event.kind for event in submission.read_events(first)]
    (array, report) = Submission(home).jobs()
    assert (array.kind, report.kind) == ("sweep", "report")
    assert _state(lab, report.job) == "COMPLETED", _output(home)
    ledger = json.loads((home / "tuning.json").read_text())
    assert {trial["state"] for arm in ledger["arms"] for trial in arm["trials"]} == {"finished"}
    runs = json.loads((home / "comparison.json").read_text())["runs"]
    assert {(run["optimizer"], run["state"]) for run in runs} == {
        ("galore", "finished"),
        ("adamw", "finished"),
    }
    confirmed = {identity for arm in ledger["arms"] for identity in arm["confirmed"]}
    assert {run["identity"] for run in runs} == confirmed
    assert lab.submit(*words)["job"] is None, "everything is finished"
