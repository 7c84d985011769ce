"""`optbench report DIR --wandb` over real HTTP, and without a server."""

from __future__ import annotations

import html
import json
import socket
import time
from pathlib import Path

import pytest

from analysis.comparison import document
from analysis.dashboards import client
from analysis.dashboards.publishing import DEFINITION, PREVIEW
from analysis.pages import screenshot
from analysis.report import command as report_command
from harness.config.schema import RunConfig
from harness.record import wandb as mirror
from harness.record.wandb import WandbSink
from tests.analysis import synthetic
from tests.analysis.dashboards.conftest import KEY
from tests.analysis.dashboards.server import Server

SECRET = "/users/zaphod-beeblebrox/secret-project"


@pytest.fixture(autouse=True)
def _no_browser(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(screenshot, "browser", lambda: None)


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Two arms, two seeds, whose records hold paths wherever a run may leave one."""
    told = {
        "command": f"optbench train data.files=[{SECRET}/a.jsonl] runs_dir={SECRET}/runs",
        "warnings": [SECRET],
    }
    keys = {
        "data": {"name": "kjv", "files": [f"{SECRET}/a.jsonl"], "vocab_size": 4096},
        "wandb": {"project": "optbench", "entity": None, "mode": "online"},
    }
    root = tmp_path / "runs"
    synthetic.group(root, ["adamw", "sumo"], [0, 1], summary=told, overrides=keys)
    failed = synthetic.TYPICAL["adamw"]
    changes = {"seed": 2, "state": "failed", "stop_at": 60, "overrides": keys}
    reason = {**told, "reason": f"FileNotFoundError: [Errno 2] No such file: '{SECRET}/a.jsonl'"}
    synthetic.write(root, synthetic.Recipe(**{**vars(failed), **changes, "summary": reason}))
    (root / "compare.json").write_text(
        json.dumps({"schema_version": 1, "commands": [f"optbench compare adamw sumo runs_dir={SECRET}"]})
    )
    return root


def _published(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[list[str], str]:
    assert report_command.main(list(words)) == 0
    out, err = capsys.readouterr()
    return out.splitlines(), err


def test_dashboards_and_artifacts_are_saved_and_saving_again_updates_them(
    server: Server, runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    waiting = WandbSink(
        RunConfig.model_validate({"wandb": {"mode": "offline"}}), runs / "sumo-seed0", "late", {}, pytest.fail
    )
    waiting.write({"step": 1, "train/loss": 2.0})
    waiting.finish({"state": "finished"}, 0)
    lines, _ = _published(capsys, str(runs), "--wandb")
    assert "W&B: 1 offline run sent" in lines
    assert server.runs.pop("late").summary["state"] == "finished"
    assert lines[-1] == str(runs / "report.html")
    assert [line.split(":")[0] for line in lines[-4:-1]] == [
        "W&B workspace",
        "W&B report",
        "W&B run with the files",
    ]
    view, text = server.views.values()
    assert (view["type"], view["entityName"], view["projectName"]) == ("project-view", "team", "optbench")
    assert (text["type"], text["displayName"]) == ("runs", "optbench: synthetic")
    (run,) = server.runs.values()
    assert (run.job_type, run.state, run.group) == ("report", "finished", "synthetic")
    assert {"comparison/report", "comparison/table", "comparison/certificates"} <= set(run.rows[-1])
    (files,) = [a for a in server.artifacts.values() if a.kind == "comparison"]
    names = {"report.html", "comparison.md", "comparison.csv", "comparison.json", "certificates.json"}
    assert files.committed
    assert set(files.manifest["contents"]) == names
    certificates = json.loads(files.blobs["certificates.json"])
    assert [row["replay_error"] for row in certificates] == [9.6e-7] * 5
    assert document.judge_folder(runs).sets[0].verdict.headline in html.unescape(
        files.blobs["report.html"].decode()
    )
    _assert_no_places(server)
    # What the dashboards hold is what the file says.
    definition = json.loads((runs / DEFINITION).read_text())
    saved = {key: value for key, value in view["spec"].items() if key != "section"}
    assert saved == {key: value for key, value in definition["workspace"]["spec"].items() if key != "section"}
    assert view["spec"]["section"] == definition["workspace"]["spec"]["section"]

    names_before, made = [view["name"], text["displayName"]], len(server.views)
    lines, _ = _published(capsys, str(runs), "--wandb", "--json")
    links = json.loads("\n".join(lines))["links"]
    assert set(links) == {"W&B workspace", "W&B report", "W&B run with the files"}
    assert len(server.views) == made
    assert [server.views[key]["name"] for key in list(server.views)[:1]] == names_before[:1]
    assert len(server.runs) == 1
    _assert_no_places(server)


def _assert_no_places(server: Server) -> None:
    for body in server.received:
        for secret in (SECRET, "zaphod-beeblebrox", KEY, str(Path.cwd())):
            assert secret.encode() not in body, (secret, body[:500])
    # The control: the last parts of those paths did go out, so it is the cut that hid the rest.
    assert any(b"a.jsonl" in body for body in server.received)


@pytest.mark.slow
def test_another_project_is_a_new_workspace(
    server: Server, runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _published(capsys, str(runs), "--wandb")
    _published(capsys, str(runs), "--wandb=team/other")
    assert [view["projectName"] for view in server.views.values()] == [
        "optbench",
        "optbench",
        "other",
        "other",
    ]


@pytest.mark.slow
def test_a_refusal_is_said_and_the_files_are_there(
    server: Server, runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.refuse = {"upsertView"}  # the report; the workspace before it is saved
    lines, _ = _published(capsys, str(runs), "--wandb")
    (said,) = [line for line in lines if line.startswith("W&B: ")]
    assert "upsertView is refused by the test" in said
    assert len(server.views) == 1
    server.refuse = set()
    lines, _ = _published(capsys, str(runs), "--wandb")
    assert len(server.views) == 2, "the workspace was saved a second time"


def test_a_server_that_refuses_the_run_is_said_in_one_line(
    server: Server, runs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        mirror, "INIT_TIMEOUT_S", 3
    )  # W&B's client asks a server that refuses again and again
    server.refuse = {"RunResumeStatus", "UpsertBucket"}
    lines, _ = _published(capsys, str(runs), "--wandb")
    (said,) = [line for line in lines if line.startswith("W&B: ")]
    assert "is refused by the test" in said
    assert "offline run" not in said
    assert server.views == {}
    assert (runs / PREVIEW).is_file()


def test_without_a_login_the_definition_is_a_file(
    runs: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setattr(socket, "create_connection", lambda *a, **k: pytest.fail("the network was asked"))
    lines, _ = _published(capsys, str(runs), "--wandb", "--out", str(tmp_path / "out"))
    (said,) = [line for line in lines if line.startswith("W&B: ")]
    assert said.startswith("W&B: not logged in (wandb login, or WANDB_API_KEY)")
    found = json.loads((tmp_path / "out" / DEFINITION).read_text())
    assert (found["project"], found["groups"], found["saved"]) == ("optbench", ["synthetic"], {})
    assert found["workspace"]["spec"]["section"]["panelBankConfig"]["sections"]
    assert found["report"]["spec"]["blocks"]
    assert "Validation loss over model FLOPs" in (tmp_path / "out" / PREVIEW).read_text()
    for name in (DEFINITION, PREVIEW):
        assert SECRET not in (tmp_path / "out" / name).read_text()


@pytest.mark.parametrize("kind", ["closed", "silent"])
def test_a_server_that_does_not_answer_costs_seconds_not_minutes(
    runs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    import wandb

    wandb.teardown()
    monkeypatch.setattr(client, "CONNECT_TIMEOUT_S", 1)
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        if kind == "silent":
            listener.listen()
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{listener.getsockname()[1]}")
        begun = time.monotonic()
        lines, _ = _published(capsys, str(runs), "--wandb")
        spent = time.monotonic() - begun
    wandb.teardown()
    (said,) = [line for line in lines if line.startswith("W&B: ")]
    assert "does not answer" in said
    assert (runs / DEFINITION).is_file()
    assert spent < 30, "bound: report and retries on a busy machine; W&B's own client waits for minutes"


def test_a_folder_of_tables_has_nothing_to_show_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "soap.csv").write_text("optimizer,seed,step,val/loss\nsoap,0,10,3.0\nsoap,0,20,2.5\n")
    lines, _ = _published(capsys, str(tmp_path), "--wandb")
    assert "W&B: none of these runs was made here; nothing to show there" in lines
    assert not (tmp_path / DEFINITION).exists()
