"""Runs read back from W&B: what the mirror sent comes back as a folder that the report compares."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from analysis.comparison import document
from analysis.dashboards import export
from analysis.pages import screenshot
from analysis.report import command as report_command
from harness.config.schema import RunConfig
from harness.errors import InputError
from harness.record.schema import METRICS
from harness.record.wandb import WandbSink
from tests.analysis import synthetic
from tests.analysis.dashboards.server import Server
from tests.analysis.dashboards.stored import StoredRun

PLACE = ("team", "optbench", "synthetic")


def _stored(server: Server, folder: Path) -> StoredRun:
    """A run folder as it lies in W&B after its mirror, without the seconds that a client takes."""
    summary = json.loads((folder / "summary.json").read_text()) if (folder / "summary.json").exists() else {}
    config = yaml.safe_load((folder / "config.yaml").read_text())
    facts = {key: summary.get(key) for key in ("identity", "comparison_key", "parameters", "unigram_entropy")}
    facts["certificate"] = json.loads((folder / "environment.json").read_text())["certificate"]
    run = StoredRun(f"id{len(server.runs)}", "optbench", folder.name, config["group"], "train")
    run.config = {key: {"value": value} for key, value in {**config, **facts}.items()}
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    lines = [json.dumps({"_step": r["step"], **{k: v for k, v in r.items() if v is not None}}) for r in rows]
    run.lines["wandb-history.jsonl"] = dict(enumerate(lines))
    kept = {key: value for key, value in summary.items() if key != "command" and value is not None}
    run.lines["wandb-summary.json"] = {0: json.dumps({**rows[-1], **kept})}
    run.exit_code = 0 if summary.get("state") == "finished" else 1
    server.runs[run.name] = run
    server.projects.add(run.project)
    return run


def test_a_comparison_comes_back_with_its_verdict(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(screenshot, "browser", lambda: None)
    source = synthetic.group(tmp_path / "there", ["adamw", "sumo"], [0, 1, 2])
    for folder in sorted(source.iterdir()):
        _stored(server, folder)
    assert report_command.main(["team/optbench/synthetic", "--export", str(tmp_path / "here"), "--json"]) == 0
    out, err = capsys.readouterr()
    assert "6 runs read from W&B" in err
    (back,) = json.loads(out)["comparison"]["sets"]
    (judged,) = document.judge_folder(source).sets
    original = document.to_json(document.judge_folder(source))["comparison"]["sets"][0]
    for key in ("verdict", "arms", "pairs", "seeds", "target", "key", "unigram_entropy"):
        assert back[key] == original[key], key
    rows = {row["optimizer"]: row for row in back["table"]["rows"]}
    assert rows["sumo"] == {row["optimizer"]: row for row in original["table"]["rows"]}["sumo"]
    first = tmp_path / "here" / "synthetic" / "sumo-seed0"
    kept = [json.loads(line) for line in (first / "metrics.jsonl").read_text().splitlines()]
    assert kept == [
        json.loads(line) for line in (source / "sumo-seed0" / "metrics.jsonl").read_text().splitlines()
    ]
    assert judged.comparison.key == back["key"]


def test_what_the_mirror_sends_comes_back_row_by_row(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = RunConfig.model_validate(
        {"wandb": {"mode": "online"}, "group": "g", "steps": 9, "data": {"files": ["/secret/place/a.jsonl"]}}
    )
    rare = {"balance/ratio": None, "moments/condition_number/max": 1e300}
    rows: list[dict[str, Any]] = [
        {
            "step": step,
            "tokens": 64 * step,
            "wall_s": step / 3,
            "flops": 10**18 + step,
            "train/loss": 4 / step,
        }
        | ({"val/loss": 5 / step, **rare} if step % 3 == 0 else {})
        for step in range(1, 10)
    ]
    folder = tmp_path / "run"
    folder.mkdir()
    sink = WandbSink(config, folder, "abcd", {"comparison_key": "k"}, pytest.fail)
    for row in rows:
        sink.write(row)
    summary = {
        "state": "finished",
        "val/loss": 5 / 9,
        "optimizer": "adamw",
        "time_s": {"data": 0.1, "other": None},
    }
    sink.finish({**summary, "comparison_key": "k", "memory_bytes": {"peak": 2**40}}, 0)
    (back,), remarks = export.export(("team", "optbench", None), tmp_path / "back")
    assert remarks == []
    assert back == tmp_path / "back" / "g" / "run"
    got = [json.loads(line) for line in (back / "metrics.jsonl").read_text().splitlines()]
    assert got == [{key: value for key, value in row.items() if value is not None} for row in rows]
    assert yaml.safe_load((back / "config.yaml").read_text()) == {
        **config.model_dump(mode="json"),
        "data": {**config.data.model_dump(mode="json"), "files": ["a.jsonl"]},
    }
    got = json.loads((back / "summary.json").read_text())
    assert got["time_s"] == {"data": 0.1, "other": None}
    assert (got["val/loss"], got["best_val_loss"], got["memory_bytes"]) == (5 / 9, 5 / 9, {"peak": 2**40})
    assert (back / "DONE").exists()


def test_odd_runs_are_kept_or_named(server: Server, tmp_path: Path) -> None:
    source = synthetic.group(tmp_path / "there", ["sumo"], [0])
    whole = _stored(server, source / "sumo-seed0")
    # Synced in two parts: W&B counts repeated rows on; the later one holds.
    lines = whole.lines["wandb-history.jsonl"]
    again = {**json.loads(lines[2]), "_step": 1000, "grad_norm": 7.0}
    lines[len(lines)] = json.dumps(again)
    lines[len(lines)] = json.dumps({"_step": 1001, "comparison/note": "no row of training"})
    running = _stored(
        server, synthetic.write(tmp_path / "there", synthetic.Recipe("adamw", state="running", stop_at=50))
    )
    running.exit_code = None
    dead = _stored(
        server, synthetic.write(tmp_path / "there", synthetic.Recipe("muon", state="running", stop_at=50))
    )
    diverged = _stored(
        server, synthetic.write(tmp_path / "there", synthetic.Recipe("galore", state="diverged", stop_at=70))
    )
    for run in (running, dead):
        run.lines["wandb-summary.json"] = {0: json.dumps(run.rows[-1])}
    diverged.display_name = "sumo-seed0"
    server.runs["other"] = StoredRun(
        "other", "optbench", "mnist", "synthetic", "train", config={"lr": {"value": 1}}
    )
    folders, remarks = export.export(PLACE, tmp_path / "here")
    assert remarks == ["mnist (other) is not a run of optbench: skipped"]
    assert [folder.name for folder in folders] == [
        "sumo-seed0",
        "adamw-seed0",
        "muon-seed0",
        "sumo-seed0-id3",
    ]
    runs = {run.where.split("/")[-1]: run for run in document.judge_folder(tmp_path / "here").runs}
    assert {name: run.state for name, run in runs.items()} == {
        "sumo-seed0": "finished",
        "adamw-seed0": "running",
        "muon-seed0": "failed",
        "sumo-seed0-id3": "diverged",
    }
    metrics = runs["sumo-seed0"].metrics
    assert len(metrics["step"]) == len(lines) - 2
    assert metrics["grad_norm"][2] == 7.0
    assert not any("twice" in note for note in runs["sumo-seed0"].notes)
    assert set(metrics) <= set(METRICS)

    # Again: the same runs are written anew; a folder of another run is not.
    running.exit_code = 1
    export.export(PLACE, tmp_path / "here")
    assert json.loads((tmp_path / "here/synthetic/adamw-seed0/status.json").read_text())["state"] == "failed"
    server.runs["id0"].name = "someone-elses"
    server.runs["someone-elses"] = server.runs.pop("id0")
    with pytest.raises(InputError, match="exists and is another run"):
        export.export(PLACE, tmp_path / "here")


def test_what_is_not_there_is_said(server: Server, tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"--export: team/nowhere could not be read: Could not find project nowhere"
    ):
        export.export(("team", "nowhere", None), tmp_path / "here")
    server.projects.add("optbench")
    with pytest.raises(InputError, match="holds no training run of optbench"):
        export.export(PLACE, tmp_path / "here")
    assert not (tmp_path / "here").exists()


def test_without_a_login_nothing_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.delenv("WANDB_MODE")
    with pytest.raises(InputError, match=r"needs W&B: not logged in .*; fix: wandb login"):
        export.export(PLACE, tmp_path / "here")
