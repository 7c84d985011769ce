"""Whatever happened to one run's files, `optbench status` and `optbench report` answer, and the others stay whole."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import pytest

from analysis.pages import screenshot
from harness import cli
from harness.jobs import grid, submission
from harness.jobs.grid import GridRow
from harness.jobs.submission import Submission
from tests.analysis import synthetic
from tests.analysis.synthetic import Recipe
from tests.faults.mutation import BOMB, mutate

FEW, MANY = 30, 600
REPORTS, MANY_REPORTS = 8, 300


@pytest.fixture(autouse=True)
def no_browser(monkeypatch: pytest.MonkeyPatch) -> None:
    """The picture takes seconds and is the same code for any content."""
    monkeypatch.setattr(screenshot, "browser", lambda: None)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two arms with two runs each, a run that is still running, and what SLURM's scripts and a lease leave."""
    root = tmp_path / "runs"
    synthetic.group(root, ["adamw", "sumo"], [0, 1], log_every=50, layers=1)
    running = synthetic.write(
        root, Recipe("muon", state="running", stop_at=60, log_every=20, has_moments=False)
    )
    (running / "heartbeat").mkdir()
    (running / "heartbeat" / "rank_00000.json").write_text(
        json.dumps({"step": 60, "where": "harness/loop.py:3 train"})
    )
    submission.add_event(running, "12", 0, "started", "attempt 1")
    Submission(running).add("12", "train", Path("/x/submit.sbatch"))
    group = Submission(root)
    group.path.mkdir()
    group.add("13", "sweep", Path("/x/sweep.sbatch"), [0])
    grid.write(group.path / grid.FILE, [GridRow(("a=1",), 0, "sumo-seed0", "/elsewhere/sumo-seed0", "id")])
    (root / ".sumo-seed0.lease").write_text(json.dumps({"job": "13_0", "token": "ab", "taken": 1.0}))
    (root / "theirs.csv").write_text("step,val/loss,optimizer,seed\n1,8.0,soap,0\n200,3.0,soap,0\n")
    return root


def answer(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    capsys.readouterr()
    code = cli.main([*words, "--json"])
    said = capsys.readouterr()
    assert code == 0, said.err
    assert "Traceback" not in said.err
    return json.loads(said.out)


def check(root: Path, victim: Path, capsys: pytest.CaptureFixture[str], *, report: bool) -> None:
    """The other runs are read as before."""
    others = {path.name for path in root.iterdir() if (path / "config.yaml").is_file() and path != victim}
    found = answer(capsys, "status", str(root))["runs"]
    states = {Path(run["folder"]).name: run["state"] for run in found}
    assert others <= states.keys()
    assert all(states[name] in ("finished", "dead", "running", "starting") for name in others), states
    assert cli.main(["status", str(root)]) == 0
    assert "\x1b" not in capsys.readouterr().out
    if report:
        runs = answer(capsys, "report", str(root), "--out", str(root.parent / "out"))["runs"]
        losses = {run["folder"]: run["final_loss"] for run in runs}
        assert others <= losses.keys()
        assert all(losses[name] for name in others if name != "muon-seed0")


@pytest.mark.parametrize(
    "seed", [*range(FEW), *(pytest.param(n, marks=pytest.mark.slow) for n in range(FEW, MANY))]
)
def test_damage_to_one_run_costs_the_others_nothing(
    root: Path, seed: int, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = random.Random(seed)
    victim = root / rng.choice(["sumo-seed0", "muon-seed0"])
    for _ in range(rng.choice([1, 1, 2, 5])):
        mutate(victim, rng)
    check(root, victim, capsys, report=seed < REPORTS or FEW <= seed < MANY_REPORTS)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("status.json", '{"state": "finished", "attempts": 3, "step": "x"}'),
        ("status.json", '{"attempts": [null, {"reason": {"a": 1}}]}'),
        ("config.yaml", BOMB),
        ("config.yaml", "a: &a {b: *a}"),
        ("summary.json", '{"state": ["x"], "time_s": 4, "warnings": {"a": 1}, "val/loss": "3"}'),
        ("metrics.jsonl", '{"step": "a"}\n' * 3 + "[" * 90_000 + '\n{"train/loss": 1}\n'),
        ("heartbeat/rank_00000.json", '{"step": 5}'),
        ("heartbeat/rank_x.json", "[]"),
        ("slurm/events.tsv", "now\t\t0\tstarted\tx\n2026\t7\t0\tstarted\tx\nx\t8\t99999999999\tstarted\ty\n"),
        ("slurm/jobs.jsonl", '{"job": 5, "kind": "train", "script": "", "rows": 3, "submitted": ""}\n[]\n'),
        ("../slurm/grid.jsonl", '{"words": 3}\n'),
        ("../slurm/grid.jsonl", '{"words": [], "folder": "/a/..", "row": 0}\n'),
        ("../.muon-seed0.lease", '{"job": ["x"], "token": {}}'),
        (
            "environment.json",
            '{"packages": 3, "git": [], "certificate": {"passed": "yes", "replay_error": []}}',
        ),
        ("parameters.json", '[{"shape": [null, {}], "numel": "many", "name": 3}, [], 4]'),
    ],
)
def test_members_of_the_kind(root: Path, name: str, content: str, capsys: pytest.CaptureFixture[str]) -> None:
    victim = root / "muon-seed0"
    (victim / name).write_text(content)
    check(root, victim, capsys, report=not name.startswith(("slurm", "heartbeat", "..")))


@pytest.mark.parametrize(
    "name", ["status.json", "metrics.jsonl", "summary.json", "moments.parquet", "../theirs.csv"]
)
def test_a_pipe_in_a_file_s_place_stops_nobody(
    root: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = root / "sumo-seed0" / name
    path.unlink()
    os.mkfifo(path)
    check(root, root / "sumo-seed0", capsys, report=True)
    if name == "status.json":
        (line,) = [
            run for run in answer(capsys, "status", str(root))["runs"] if run["name"] == "runs/sumo-seed0"
        ]
        assert line["problems"] == ["status.json is a named pipe, not a file"]


def test_a_run_that_cannot_be_read_is_one_line(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    victim = root / "muon-seed0"
    (victim / "status.json").write_text("{")
    for name in ("slurm", "heartbeat"):
        for path in (victim / name).iterdir():
            path.unlink()
    (line,) = [run for run in answer(capsys, "status", str(root))["runs"] if run["name"] == "runs/muon-seed0"]
    assert line["state"] == "unreadable"
    assert line["reason"].startswith("status.json can't be read")
