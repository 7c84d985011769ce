"""Sharded runs through the launcher: they start, leave a complete folder and end without an abort."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.harness import warm
from tests.harness.running import small, write_documents

pytestmark = pytest.mark.launch
LIMIT_S = 240


@pytest.mark.parametrize("engine", [pytest.param("fsdp2", marks=pytest.mark.slow), "zero3"])
def test_a_launched_run_is_complete_and_ends_in_peace(engine: str, tmp_path: Path) -> None:
    words = [
        "optimizer=sumo",
        "optimizer.rank=8",
        "optimizer.lr=0.003",
        f"engine={engine}",
        "world_size=2",
        "name=run",
    ]
    done = warm.run("train", *small(write_documents(tmp_path), tmp_path, *words), timeout=LIMIT_S)
    assert done.returncode == 0, done.stderr
    said = done.stdout + done.stderr
    # Gloo's threads can abort a process after all its work (torch 2.13); the exit code does not show it.
    for sign in ("Traceback", "terminate called", "SIGABRT", "Warning"):
        assert sign not in said, said
    folder = tmp_path / "default" / "run"
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["state"], summary["engine"], summary["world_size"]) == ("finished", engine, 2)
    assert (folder / "DONE").exists()
    numbers = sum(entry["numel"] for entry in json.loads((folder / "parameters.json").read_text()))
    assert summary["parameters"] == numbers == 50_336
    assert summary["matrix_parameters"] > 0
    assert (folder / "deepspeed.json").exists() == (engine == "zero3")
    if engine == "zero3":
        settings = json.loads((folder / "deepspeed.json").read_text())
        assert settings["gradient_clipping"] == 1.0
        assert settings["zero_optimization"] == {"stage": 3}


@pytest.mark.slow
def test_a_users_own_deepspeed_launcher_works(tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    file.write_text(
        json.dumps({"train_batch_size": "auto", "zero_optimization": {"stage": 2, "overlap_comm": False}})
    )
    words = small(write_documents(tmp_path), tmp_path, "engine=zero2", "world_size=2", "name=run", "steps=2")
    launch = "-m accelerate.commands.accelerate_cli launch --use_deepspeed --num_processes 2 --num_machines 1"
    flags = ["--dynamo_backend", "no", "--main_process_port", "29643", "--deepspeed_config_file", str(file)]
    done = subprocess.run(
        [sys.executable, *launch.split(), *flags, "-m", "harness.train", *words],
        env={**os.environ, "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "default" / "run"
    # Accelerate's own plugin would have made two runs of one process each.
    assert json.loads((folder / "summary.json").read_text())["world_size"] == 2
    settings = json.loads((folder / "deepspeed.json").read_text())
    assert settings["zero_optimization"] == {"stage": 2, "overlap_comm": False}
