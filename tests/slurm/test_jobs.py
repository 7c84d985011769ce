"""`optbench submit` and `status` on a real Slurm: what happens to jobs must not happen to runs."""

from __future__ import annotations

import json
import re
import signal
import stat
from pathlib import Path
from typing import Any

import psutil
import pytest

from harness.jobs import submission
from tests.faults.checkpoints import assert_same, assert_whole, status
from tests.faults.forked import Training
from tests.slurm.conftest import Lab

pytestmark = [pytest.mark.launch, pytest.mark.timeout(420)]
WAIT_S = 240
STEPS = 40
QUIET = ("eval.every=null", "moments.every=null", "optimizer=galore", "optimizer.rank=8", "engine.threads=1")


def _events(run: Path) -> list[str]:
    return [event.kind for event in submission.read_events(run)]


def _output(run: Path) -> str:
    return "\n".join(path.read_text() for path in sorted((run / "slurm" / "logs").glob("*.out")))


def _state(lab: Lab, job: str) -> str:
    return lab.slurm.wait(int(job), WAIT_S)["JobState"]


def _training_of(run: Path) -> list[psutil.Process]:
    """The processes that train a run, without their launchers."""
    found = []
    for process in psutil.process_iter():
        try:
            words = process.cmdline()
        except psutil.Error:
            continue
        if (
            {"harness.train", f"name={run.name}"} <= set(words)
            and "accelerate.commands.launch" not in words
            and words[0].endswith(("python", "python3"))
        ):
            found.append(process)
    return found


def _is_asked(process: psutil.Process) -> bool:
    """Whether USR1 waits for a process that is suspended."""
    said = Path(f"/proc/{process.pid}/status").read_text()
    return any(
        int(mask, 16) >> (signal.SIGUSR1 - 1) & 1 for mask in re.findall(r"(?:Sig|Shd)Pnd:\s*(\w+)", said)
    )


@pytest.mark.parametrize("each", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_two_nodes_pushed_aside_go_on_and_end_as_if_nothing_had_been(
    each: int, lab: Lab, tmp_path: Path
) -> None:
    """With so many processes on each node."""
    world = 2 * each
    words = lab.words(*QUIET, f"steps={STEPS}", "checkpoint.every=1000", f"runs_dir={tmp_path}", "name=cut")
    more = [
        "cluster.nodes=2",
        f"cluster.processes={each}",
        "cluster.preflight.enabled=true",
        "cluster.preflight.min_gb_per_s=0",
    ]
    queued = lab.submit(*words, *more, "--then", f"clean {tmp_path}")
    run = tmp_path / "default" / "cut"
    lab.slurm.until(lambda: len(_training_of(run)) == world, WAIT_S, "training processes")
    ranks = _training_of(run)
    lab.slurm.until(lambda: len(list(run.glob("heartbeat/*.json"))) == world, WAIT_S, "life", every_s=0.02)
    # Suspended, the run is not over before the scheduler acts, however few steps it has.
    for process in ranks:
        process.suspend()
    lab.slurm.submit("-p", "hi", "--nodes=3", "--exclusive", "--output=/dev/null", "--wrap", "sleep 1")
    lab.slurm.until(lambda: all(map(_is_asked, ranks)), WAIT_S, "signal that asks for an end")
    for process in ranks:
        process.resume()
    assert _state(lab, queued["job"]) == "COMPLETED", _output(run)
    assert lab.slurm.facts(queued["job"])["Restarts"] == "1"
    assert _events(run) == ["started", "requeued", "started", "finished"]
    assert "preflight: node2: 0 GPUs" in _output(run)
    (resumed,) = json.loads((run / "summary.json").read_text())["resumed_from"]
    assert 0 < resumed < STEPS
    assert json.loads((run / "summary.json").read_text())["world_size"] == world
    after = lab.slurm.wait(int(queued["then"][0]["job"]), WAIT_S)
    assert after["JobState"] == "COMPLETED"
    assert after["StartTime"] >= lab.slurm.facts(queued["job"])["EndTime"], "it waited for the second attempt"
    whole = [word for word in words if not word.startswith(("cluster", "name"))]
    whole += ["name=whole", f"world_size={world}"]
    assert Training(whole, world, tmp_path / "whole.txt").wait(WAIT_S) == [0] * world
    assert_same(run.parent / "whole", run, STEPS)


def test_of_a_grid_only_the_row_that_was_killed_is_queued_again(lab: Lab, tmp_path: Path) -> None:
    words = ["compare", "galore", "muon", "seeds=1", "group=grid"]
    words += lab.words(f"runs_dir={tmp_path}", "galore.rank=4")
    words += ["cluster.processes=1", "cluster.cpus=1", "cluster.throttle=2"]
    queued = lab.submit(*words)
    group, killed = tmp_path / "grid", tmp_path / "grid" / "muon-seed0"
    assert [row["name"] for row in queued["rows"]] == ["galore-seed0", "muon-seed0"]
    # A second job for a row that waits or runs: it must wait, and then find nothing to do.
    second = lab.slurm.submit("--array=0", queued["script"])
    lab.slurm.until(lambda: len(_training_of(killed)) == 1, WAIT_S, "the row to be killed")
    _training_of(killed)[0].kill()
    _state(lab, queued["then"][0]["job"])
    assert (group / "report.html").exists(), "the report runs although a row failed"
    found = lab.status(tmp_path)
    assert {run["state"] for name, run in found.items() if name != killed.name} == {"finished"}
    assert found[killed.name]["state"] == "failed"
    assert "code 137" in found[killed.name]["reason"]
    _state(lab, str(second))
    assert len(status(group / "galore-seed0")["attempts"]) == 1
    grid = (group / "slurm" / "grid.jsonl").read_text()
    again = lab.submit(*words)
    assert again["rows"] == [{"row": 1, "name": killed.name}]
    assert [row["reason"] for row in again["skipped"]] == ["finished"]
    assert (group / "slurm" / "grid.jsonl").read_text() == grid
    assert lab.submit(*words)["rows"] == [], "a row that waits or runs is not queued twice"
    # One report is enough.
    lab.slurm.signal(again["then"][0]["job"])
    _state(lab, again["job"])
    assert lab.status(tmp_path)[killed.name]["state"] == "finished"


def test_a_node_that_goes_down_and_a_run_that_is_cancelled(lab: Lab, tmp_path: Path) -> None:
    words = lab.words(
        *QUIET, "steps=100000", "schedule=constant", "checkpoint.every=10", f"runs_dir={tmp_path}"
    )
    queued = lab.submit(*words, "name=run", "cluster.processes=1", "cluster.cpus=1")
    run, job = tmp_path / "default" / "run", queued["job"]
    lab.slurm.until(lambda: bool(list(run.glob("checkpoints/step_*"))), WAIT_S, "a checkpoint")
    with pytest.raises(AssertionError, match=r"has job \d+ already, which is RUNNING; fix: optbench status"):
        lab.submit(*words, "name=run", "cluster.processes=1")
    node = lab.slurm.facts(job)["NodeList"]
    lab.slurm.control("update", f"NodeName={node}", "State=DOWN", "Reason=test")
    lab.slurm.until(lambda: len(status(run)["attempts"]) == 2, WAIT_S, "a second attempt")
    lab.slurm.until(lambda: lab.status(tmp_path)["run"]["state"] == "running", WAIT_S, "signs of life")
    # Nobody asked for it: SLURM queued it again when it lost the node (which came back when it registered again).
    assert lab.slurm.facts(job)["Restarts"] == "1"
    assert _events(run).count("started") == 2
    assert "requeued" not in _events(run)
    lab.slurm.until(lambda: status(run)["attempts"][1]["first_step"] >= 10, WAIT_S, "it to resume")
    assert lab.status(tmp_path)["run"]["restarts"] == 1
    lab.slurm.signal(job)
    assert _state(lab, job) == "CANCELLED"
    found = lab.status(tmp_path)["run"]
    assert found["state"] == "cancelled"
    # It was saved, and nobody queued it again.
    assert found["step"] in assert_whole(run)
    assert _events(run)[-1] == "cancelled"
    lab.optbench("status", str(tmp_path), "--resubmit", "run")
    lab.slurm.until(lambda: lab.status(tmp_path)["run"]["state"] == "running", WAIT_S, "a third attempt")
    # What preemption is on clusters that send no USR1: SIGTERM to the steps.
    again = lab.status(tmp_path)["run"]["job"]
    assert int(again) > int(job)
    lab.slurm.signal(again, "-s", "TERM")
    lab.slurm.until(
        lambda: lab.status(tmp_path)["run"]["state"] == "requeued", WAIT_S, "a job that waits again"
    )
    assert "SIGTERM" in status(run)["attempts"][2]["reason"]
    lab.optbench("status", str(tmp_path), "--cancel", "default/run")
    assert _state(lab, again) == "CANCELLED"
    assert lab.status(tmp_path)["run"]["state"] == "cancelled"


@pytest.mark.slow  # trains until Slurm looks at its clock, which it does once a minute
def test_the_time_limit_ends_with_a_checkpoint_and_the_cap_with_a_word(lab: Lab, tmp_path: Path) -> None:
    words = lab.words(
        *QUIET, "steps=100000", "schedule=constant", "checkpoint.every=null", f"runs_dir={tmp_path}"
    )
    # The signal comes up to a minute early: at once, or after 10 s.
    more = ["name=run", "cluster.processes=1", "cluster.cpus=1", "cluster.time=2m", "cluster.grace_s=110"]
    queued = lab.submit(*words, *more, "cluster.max_restarts=0")
    assert _state(lab, queued["job"]) == "FAILED"
    run = tmp_path / "default" / "run"
    assert lab.slurm.facts(queued["job"])["ExitCode"] == "75:0", _output(run)
    assert status(run)["state"] == "interrupted"
    assert assert_whole(run) == [status(run)["step"]]
    assert status(run)["step"] > 0
    found = lab.status(tmp_path)["run"]
    assert found["state"] == "stopped"
    assert found["reason"].endswith("queued again 0 times, which is the most allowed")


def test_what_cannot_work_is_said_before_it_costs_anything(lab: Lab, tmp_path: Path) -> None:
    words = lab.words(f"runs_dir={tmp_path}", "name=run")
    _, said = lab.optbench("submit", *words, "cluster.partition=nope", code=2)
    assert said.splitlines()[-1].startswith("cluster.partition: nope is refused by SLURM (invalid partition")
    assert said.endswith("allowed: ci, hi; fix: cluster.partition=ci\n")
    _, said = lab.optbench("submit", *words, "cluster.nodes=4", code=2)
    assert "cluster.nodes: 4 is refused by SLURM" in said
    (tmp_path / "file").touch()
    _, said = lab.optbench("submit", *words, f"cluster.logs={tmp_path / 'file' / 'logs'}", code=2)
    assert "cluster.logs: " in said
    assert "cannot be written (Not a directory)" in said
    assert not (tmp_path / "default" / "run" / "slurm" / "submit.sbatch").exists()


def test_a_head_node_that_cannot_be_resolved_is_named(lab: Lab, tmp_path: Path) -> None:
    words = lab.words(f"runs_dir={tmp_path}", "name=run", "batch_size=8")
    queued = lab.submit(*words, "cluster.nodes=2", "cluster.address_suffix=-ib.invalid")
    assert _state(lab, queued["job"]) == "FAILED"
    found = lab.status(tmp_path)["run"]
    assert found["state"] == "failed"
    assert "the address 'node1-ib.invalid' of the first node, node1, cannot be resolved" in found["reason"]


@pytest.mark.slow
def test_a_bad_node_is_named_and_left_out(lab: Lab, tmp_path: Path) -> None:
    """In its container a node starts nothing, so that it does not answer the others."""
    broken = tmp_path / "container"
    broken.write_text('#!/bin/bash\n[ "$SLURMD_NODENAME" != node2 ] || exec sleep 60\nexec "$@"\n')
    broken.chmod(broken.stat().st_mode | stat.S_IXUSR)
    words = lab.words(f"runs_dir={tmp_path}", "name=run", "cluster.nodes=2", f"cluster.container=[{broken}]")
    words += ["cluster.preflight={enabled: true, timeout_s: 20}", "cluster.exclude_bad_nodes=true"]
    queued = lab.submit(*words, "--then", f"report {tmp_path / 'default'}")
    run = tmp_path / "default" / "run"
    assert _state(lab, queued["job"]) == "FAILED"
    facts: dict[str, Any] = {event.kind: event for event in submission.read_events(run)}
    assert facts["preflight"].text == "node2: did not answer"
    again = facts["resubmitted"].text.split(",")[0]
    assert _state(lab, again) == "COMPLETED", _output(run)
    assert lab.slurm.facts(again)["NodeList"] == "node[1,3]"
    assert lab.status(tmp_path)["run"]["state"] == "finished"
    report = lab.slurm.wait(int(queued["then"][0]["job"]), WAIT_S)
    assert report["StartTime"] >= lab.slurm.facts(again)["EndTime"], "it waited for the second job, too"
