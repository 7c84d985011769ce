"""Whole runs through the real launchers: what they leave behind, how they end, and how they are stopped."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest

from harness.record import readers
from harness.record.schema import METRICS, SUMMARY_KEYS
from tests.harness import warm
from tests.harness.record import wandb_file
from tests.harness.running import small, write_documents

pytestmark = pytest.mark.launch
LIMIT_S = 240


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_documents(tmp_path_factory.mktemp("text"))


def _train(words: list[str]) -> subprocess.CompletedProcess[str]:
    return warm.run("train", *words, timeout=LIMIT_S)


def _only_run(runs_dir: Path) -> Path:
    (folder,) = [path for path in (runs_dir / "default").iterdir() if path.is_dir()]
    return folder


def _state(folder: Path) -> str:
    return json.loads((folder / "status.json").read_text())["state"]


def test_two_processes_leave_a_complete_run_folder_and_the_same_in_wandb(
    corpus: Path, tmp_path: Path
) -> None:
    words = small(
        corpus,
        tmp_path,
        "world_size=2",
        "steps=6",
        "optimizer=sumo",
        "optimizer.rank=8",
        "optimizer.lr=0.003",
        "wandb.mode=offline",
    )
    command = [sys.executable, "-m", "harness.cli", "train", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == str(_only_run(tmp_path))
    folder = _only_run(tmp_path)
    for name in ("config.yaml", "config.diff.yaml", "environment.json", "parameters.json", "log.txt", "DONE"):
        assert (folder / name).exists(), name
    rows, _ = readers.metrics(folder / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]  # log_every=2, evaluation every step of six
    assert all(row.keys() <= METRICS.keys() for row in rows)
    assert rows[-1]["val/loss"] is not None
    assert rows[-1]["moments/condition_number/median"] is not None
    summary = json.loads((folder / "summary.json").read_text())
    assert summary.keys() == SUMMARY_KEYS.keys()
    assert summary["state"] == "finished"
    assert summary["world_size"] == 2
    assert summary["tokens"] == 6 * 8 * 32
    moments = pq.read_table(folder / "moments.parquet").to_pylist()
    assert {row["step"] for row in moments} >= {1, 6}
    assert {row["rule"] for row in moments} == {"sumo"}
    assert len({row["layer"] for row in moments}) == 14
    rules = {entry["rule"] for entry in json.loads((folder / "parameters.json").read_text())}
    assert rules == {"sumo", "adamw"}

    (mirror,) = (folder / "wandb").glob("offline-run-*/run-*.wandb")
    logged = wandb_file.history(mirror)
    assert len(logged) == len(rows)
    for row, sent in zip(rows, logged):
        assert {key: sent[key] for key in row if row[key] is not None} == {
            k: v for k, v in row.items() if v is not None
        }
    record = wandb_file.run_record(mirror)
    assert record.run_id == json.loads((folder / "status.json").read_text())["wandb_run_id"]
    assert (record.run_group, record.job_type) == ("default", "train")
    assert wandb_file.config(mirror)["optimizer"]["name"] == "sumo"
    secrets = (os.uname().nodename, str(Path.home()), str(tmp_path))
    text = mirror.read_bytes().decode(errors="ignore")
    assert not [secret for secret in secrets if len(secret) > 5 and secret in text], (
        "the machine shows in W&B's file"
    )


def test_json_is_one_document_on_standard_output(corpus: Path, tmp_path: Path) -> None:
    done = _train([*small(corpus, tmp_path, "steps=2"), "--json"])
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["schema_version"] == 1
    assert document["state"] == "finished"
    assert document["summary"]["steps"] == 2
    again = _train(small(corpus, tmp_path, "steps=2"))
    assert again.returncode == 2
    assert "is a finished run" in again.stderr.splitlines()[-1]


def test_divergence_is_said_counted_and_coded(corpus: Path, tmp_path: Path) -> None:
    done = _train(
        small(corpus, tmp_path, "steps=30", "optimizer.lr=1e30", "max_skipped_steps=3", "max_grad_norm=null")
    )
    assert done.returncode == 3, done.stderr
    summary = json.loads((_only_run(tmp_path) / "summary.json").read_text())
    assert summary["state"] == "diverged"
    assert summary["skipped_steps"] == 4
    assert summary["steps"] < 30
    assert summary["val/loss"] is None


def _started(words: list[str], runs_dir: Path, rows: int) -> tuple[warm.Command, Path]:
    """A run in the background that has written some rows."""
    process = warm.Command("train", *words, merged=True)
    deadline = time.monotonic() + LIMIT_S
    while time.monotonic() < deadline and process.poll() is None:
        found = list((runs_dir / "default").glob("*/metrics.jsonl"))
        if found and len(found[0].read_text().splitlines()) >= rows:
            return process, found[0].parent
        time.sleep(0.1)
    process.kill()
    raise AssertionError(f"no rows: {process.communicate()[0]}")


@pytest.mark.parametrize("world_size", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_ctrl_c_finishes_the_step_and_says_75(world_size: int, corpus: Path, tmp_path: Path) -> None:
    words = small(
        corpus, tmp_path, "steps=100000", f"world_size={world_size}", "eval.every=null", "schedule=constant"
    )
    process, folder = _started(words, tmp_path, rows=3)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 75, output
    assert _state(folder) == "interrupted"
    summary = json.loads((folder / "summary.json").read_text())
    assert 0 < summary["steps"] < 100000
    assert "stopped by Ctrl-C (SIGINT)" in summary["reason"]
    assert output.splitlines()[-2:] == [
        f"to resume: {shlex.join(['optbench', 'train', *words])}",
        str(folder),
    ]
    assert (folder / "REQUEUE").read_text() == f"{summary['steps']}\n"
    assert (folder / "checkpoints" / "latest").read_text() == f"step_{summary['steps']:08d}\n"
    assert not (folder / "DONE").exists()
    assert not [line for line in output.splitlines() if line.startswith("Traceback")]


def test_a_killed_run_is_readable_and_called_failed(corpus: Path, tmp_path: Path) -> None:
    words = small(corpus, tmp_path, "steps=100000", "world_size=2", "eval.every=null", "schedule=constant")
    process, folder = _started(words, tmp_path, rows=3)
    workers = [
        p
        for p in psutil.Process(process.pid).children(recursive=True)
        if p.name().startswith("optbench-rank")
    ]
    for worker in workers:
        worker.send_signal(signal.SIGKILL)
    output, _ = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 3, output
    assert _state(folder) == "failed"
    rows, _ = readers.metrics(folder / "metrics.jsonl")
    assert len(rows) >= 3
    assert rows[0]["step"] == 1
    assert (folder / "config.yaml").exists()
    assert pq.read_table(folder / "moments.parquet").num_columns == 8
    assert not (folder / "DONE").exists()


@pytest.mark.parametrize("engine", ["ddp", pytest.param("fsdp2", marks=pytest.mark.slow)])
def test_a_rank_that_dies_is_named_and_soon(engine: str, corpus: Path, tmp_path: Path) -> None:
    """The other rank sits in a collective and sees a broken connection; the reason says whose."""
    words = small(
        corpus,
        tmp_path,
        "steps=100000",
        "world_size=2",
        "eval.every=null",
        "schedule=constant",
        f"engine={engine}",
        "optimizer=sumo",
        "optimizer.rank=8",
    )
    process, folder = _started(words, tmp_path, rows=3)
    (victim,) = [
        p for p in psutil.Process(process.pid).children(recursive=True) if p.name() == "optbench-rank1"
    ]
    begin = time.monotonic()
    victim.send_signal(signal.SIGKILL)
    output, _ = process.communicate(timeout=LIMIT_S)
    assert time.monotonic() - begin < 60
    assert process.returncode == 3, output
    status = json.loads((folder / "status.json").read_text())
    assert status["state"] == "failed"
    assert status["attempts"][-1]["reason"].startswith("rank 1 ended unexpectedly (killed, or out of memory)")
    assert "rank 1 ended unexpectedly" in output


@pytest.mark.slow
def test_two_machines_as_two_launchers_on_loopback(corpus: Path, tmp_path: Path) -> None:
    words = small(corpus, tmp_path, "world_size=2", "steps=3")
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "GLOO_SOCKET_IFNAME": "lo"}
    flags = (
        "--multi_gpu --num_machines 2 --num_processes 2 --main_process_ip 127.0.0.1 --main_process_port 29641"
    )
    machines = [
        subprocess.Popen(
            [
                sys.executable,
                "-m",
                "accelerate.commands.accelerate_cli",
                "launch",
                *flags.split(),
                "--machine_rank",
                str(rank),
                "--rdzv_backend",
                "static",
                "--mixed_precision",
                "no",
                "--dynamo_backend",
                "no",
                "-m",
                "harness.train",
                *words,
            ],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [machine.communicate(timeout=LIMIT_S)[0] for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], outputs
    folder = _only_run(tmp_path)
    assert json.loads((folder / "summary.json").read_text())["world_size"] == 2
    assert (folder / "DONE").exists()


def test_bad_input_under_a_bare_launcher_stands_once(corpus: Path, tmp_path: Path) -> None:
    words = small(corpus, tmp_path, "world_size=2", "optimizer.rnk=8", "optimizer=sumo")
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "accelerate.commands.accelerate_cli",
            "launch",
            "--multi_gpu",
            "--num_processes",
            "2",
            "--num_machines",
            "1",
            "--mixed_precision",
            "no",
            "--dynamo_backend",
            "no",
            "--main_process_port",
            "29642",
            "-m",
            "harness.train",
            *words,
        ],
        env={**os.environ, "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )
    assert done.returncode != 0
    lines = [line for line in (done.stderr + done.stdout).splitlines() if line.startswith("optimizer.rnk:")]
    assert len(lines) == 1, done.stderr
    assert "did you mean optimizer.rank?" in lines[0]
    assert not (tmp_path / "default").exists()


def test_what_only_the_model_shows_is_one_line_too_and_leaves_no_folder(corpus: Path, tmp_path: Path) -> None:
    done = _train(
        small(
            corpus,
            tmp_path,
            "model.model_type=mistral",
            "model.config.num_key_value_heads=2",
            "+model.config.sliding_windw=3",
        )
    )
    assert done.returncode == 2, done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("model.config.sliding_windw:")
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "default").exists()
