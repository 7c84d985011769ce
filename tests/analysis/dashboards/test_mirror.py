"""The mirror of real training processes over real HTTP: killed and resumed, synced from files, what it gives away."""

from __future__ import annotations

import json
import re
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from analysis.dashboards import client
from harness.config.schema import RunConfig
from harness.record.wandb import WandbSink
from tests.analysis.dashboards.conftest import KEY
from tests.analysis.dashboards.server import Server
from tests.analysis.dashboards.stored import StoredRun
from tests.faults.forked import Training, trained
from tests.harness.running import small, write_documents

USER = "zaphod-beeblebrox"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_documents(tmp_path_factory.mktemp("text"))


def _words(corpus: Path, folder: Path, mode: str) -> list[str]:
    return small(
        corpus,
        folder / "runs",
        f"wandb.mode={mode}",
        "optimizer=sumo",
        "optimizer.rank=8",
        "steps=400",
        "log_every=20",
        "eval.every=40",
        "checkpoint.every=60",
        "moments.every=null",
        "group=killed",
        "name=one",
    )


def _environment(folder: Path, server: Server) -> dict[str, str]:
    home = folder / "home"
    home.mkdir(exist_ok=True)
    return {
        "WANDB_BASE_URL": server.url,
        "WANDB_API_KEY": KEY,
        "WANDB_CACHE_DIR": str(home / "cache"),
        "WANDB_DATA_DIR": str(home / "data"),
        "WANDB_MODE": "online",
        "HOME": str(home),
        "USER": USER,
        "LOGNAME": USER,
    }


def _killed(
    words: list[str], folder: Path, environment: dict[str, str], is_open: Callable[[Path], bool]
) -> Path:
    """Start the run and kill it once W&B is open and there is a checkpoint; returns its folder."""
    run = folder / "runs" / "killed" / "one"
    training = Training(words, 1, folder / "said.txt", environment=environment)
    until = time.monotonic() + 60
    saved = run / "checkpoints" / "step_00000060"
    while not (saved.exists() and is_open(run)) and time.monotonic() < until:
        time.sleep(0.005)
    training.kill(signal.SIGKILL)
    training.wait()
    assert not (run / "DONE").exists(), training.said()
    return run


def _rows(run: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / name).read_text().splitlines()]


def _assert_mirrors(stored: StoredRun, run: Path) -> None:
    """Every row of the folder once, in order, with the numbers of the folder; what is null there is not sent.

    A row that was sent before a kill and repeated after it has its first attempt's seconds and memory.
    """
    measured = ("wall_s", "throughput/", "time/", "memory/", "balance/")
    rows = _rows(run)
    assert [row["step"] for row in stored.rows] == [row["step"] for row in rows]
    assert [row["_step"] for row in stored.rows] == [row["step"] for row in rows]
    for sent, kept in zip(stored.rows, rows, strict=True):
        assert {key for key in sent if not key.startswith("_")} == {
            k for k, v in kept.items() if v is not None
        }
        for key, value in kept.items():
            if value is not None and not key.startswith(measured):
                assert sent[key] == value, (kept["step"], key)
    assert stored.summary["state"] == "finished"
    assert stored.summary["val/loss"] == rows[-1]["val/loss"]
    assert stored.summary["best_val_loss"] == min(row["val/loss"] for row in rows if "val/loss" in row)
    assert stored.state == "finished"


def test_a_killed_run_goes_on_in_the_same_wandb_run(server: Server, corpus: Path, tmp_path: Path) -> None:
    words, environment = _words(corpus, tmp_path, "online"), _environment(tmp_path, server)
    run = _killed(words, tmp_path, environment, lambda run: bool(server.runs))
    (before,) = server.runs.values()
    sent, logged = len(before.rows), len(_rows(run))
    assert sent < logged, "nothing was lost at the kill: this test shows nothing"
    assert trained(words, 1, tmp_path / "said.txt", environment=environment) == [0]
    (stored,) = server.runs.values()
    status = json.loads((run / "status.json").read_text())
    assert stored.name == status["wandb_run_id"]
    assert [attempt["first_step"] > 0 for attempt in status["attempts"]] == [False, True]
    _assert_mirrors(stored, run)
    assert (stored.group, stored.job_type, stored.display_name) == ("killed", "train", "one")
    assert stored.values["optimizer"]["name"] == "sumo"
    assert stored.values["certificate"]["passed"] is True
    _assert_gives_nothing_away(server, run, tmp_path, environment)


@pytest.mark.slow
def test_offline_attempts_are_synced_as_one_run(server: Server, corpus: Path, tmp_path: Path) -> None:
    """W&B's file of the killed attempt is torn: `wandb sync` of both would stop there."""
    words, environment = _words(corpus, tmp_path, "offline"), _environment(tmp_path, server)
    run = _killed(words, tmp_path, environment, lambda run: bool(list(run.glob("wandb/*/run-*.wandb"))))
    assert trained(words, 1, tmp_path / "said.txt", environment=environment) == [0]
    assert server.received == []
    # The torn files of the first attempt are gone: the second one's hold their rows, too.
    assert len(list((run / "wandb").glob("*offline-run-*"))) == 1
    assert client.sync(run) is None
    (stored,) = server.runs.values()
    _assert_mirrors(stored, run)
    _assert_gives_nothing_away(server, run, tmp_path, environment)


def _assert_gives_nothing_away(
    server: Server, run: Path, tmp_path: Path, environment: dict[str, str]
) -> None:
    """No key, user, host or path among the bytes that left, none of the first three in the run folder.

    Paths that the user gave stand in the folder's configuration and command line: the run goes on from those.
    """
    host = socket.gethostname()
    secrets = [KEY, USER, environment["HOME"]]
    places = [str(tmp_path), str(Path.cwd()), sys.prefix]
    as_word = re.compile(rf"(?<![A-Za-z0-9]){re.escape(host)}(?![A-Za-z0-9])".encode())
    assert len(server.received) > 10
    for body in server.received:
        for secret in (*secrets, *places):
            assert secret.encode() not in body, (secret, body[:2000])
        assert not as_word.search(body), body[:2000]
    given = ("config.yaml", "config.diff.yaml", "summary.json")
    for path in (path for path in run.rglob("*") if path.is_file()):
        data = path.read_bytes()
        for secret in secrets:
            assert secret.encode() not in data, (secret, path)
        if path.suffix not in (".safetensors", ".wandb"):
            assert not as_word.search(data), path
            for place in () if path.name in given else places:
                assert place.encode() not in data, (place, path)


def test_the_check_of_privacy_sees_what_is_sent_when_asked_for(
    server: Server, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control: with wandb.upload_machine_facts=true the host is sent, and the check says so."""
    environment = _environment(tmp_path, server)
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    keys = {"wandb": {"mode": "online", "upload_machine_facts": True}, "group": "g"}
    folder = tmp_path / "run"
    folder.mkdir()
    sink = WandbSink(RunConfig.model_validate(keys), folder, "asked", {}, pytest.fail)
    for step in range(1, 12):
        sink.write({"step": step, "train/loss": 1.0})
    sink.finish({"state": "finished"}, 0)
    assert server.runs["asked"].host == socket.gethostname()
    with pytest.raises(AssertionError):
        _assert_gives_nothing_away(server, folder, tmp_path, environment)


def _sink(folder: Path, mode: str) -> WandbSink:
    folder.mkdir(exist_ok=True)
    keys = {"wandb": {"mode": mode}, "group": "g"}
    return WandbSink(RunConfig.model_validate(keys), folder, "again", {}, pytest.fail)


def _row(step: int, attempt: int) -> dict[str, Any]:
    """The lowest loss is at step 20; seconds tell the attempts apart."""
    return {"step": step, "tokens": 8 * step, "wall_s": step + attempt / 10, "val/loss": abs(step - 20) + 1.0}


def test_a_second_attempt_sends_what_is_missing_and_nothing_twice(server: Server, tmp_path: Path) -> None:
    """Attempt 1 logs up to step 50 and ends; attempt 2 goes on from step 30, and logs other steps than 1 did."""
    first = _sink(tmp_path / "run", "online")
    for step in (10, 20, 30, 40, 50):
        first.write(_row(step, 1))
    first.finish({"state": "interrupted"}, 0)
    second = _sink(tmp_path / "run", "online")
    second.catch_up([_row(step, 1) for step in (10, 20, 30)])
    for step in (35, 45, 55, 65):
        second.write(_row(step, 2))
    second.finish({"state": "finished", "command": "optbench train"}, 0)
    stored = server.runs["again"]
    assert [(row["step"], round(10 * row["wall_s"]) % 10) for row in stored.rows] == [
        (10, 1), (20, 1), (30, 1), (40, 1), (50, 1), (55, 2), (65, 2),
    ]  # fmt: skip
    assert stored.summary["best_val_loss"] == 1.0
    assert stored.summary["val/loss"] == 46.0
    assert (stored.summary["state"], stored.state) == ("finished", "finished")
    assert "command" not in stored.summary


def test_without_catching_up_rows_of_a_torn_file_would_be_lost(server: Server, tmp_path: Path) -> None:
    """The control: offline, a second attempt that logs only its own rows leaves W&B without the first ones."""
    for attempt, steps in ((1, (10, 20)), (2, (30, 40))):
        sink = _sink(tmp_path / "run", "offline")
        for step in steps:
            sink.write(_row(step, attempt))
        sink.finish({"state": "finished"}, 0)
    assert len(client.unsent_folders(tmp_path / "run")) == 1
    assert client.sync(tmp_path / "run") is None
    assert [row["step"] for row in server.runs["again"].rows] == [30, 40]
    assert client.unsent_folders(tmp_path / "run") == []
    # What was synced is not set aside by a third attempt, nor sent again.
    sink = _sink(tmp_path / "run", "offline")
    sink.finish({}, 0)
    assert len(list((tmp_path / "run" / "wandb").glob("offline-run-*"))) == 2
    assert len(client.unsent_folders(tmp_path / "run")) == 1


def test_a_sync_that_fails_is_said(tmp_path: Path, server: Server) -> None:
    folder = tmp_path / "run" / "wandb" / "offline-run-20260101_000000-x"
    folder.mkdir(parents=True)
    (folder / "run-x.wandb").write_bytes(b"no transaction log")
    assert "ERROR Failed to read" in str(client.sync(tmp_path / "run"))
    assert server.runs == {}
