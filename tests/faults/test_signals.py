"""Asked to stop, by a signal or by the clock: the step is finished, saved, and the processes end with code 0."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.faults.checkpoints import assert_same, assert_whole, status, wait_for_checkpoint, wait_for_step
from tests.faults.forked import Training, import_once, trained
from tests.harness.running import small

STEPS = 60
BASE = [f"steps={STEPS}", "eval.every=null", "moments.every=null", "optimizer=galore", "optimizer.rank=8"]
ENDLESS = ["steps=100000", "eval.every=null", "moments.every=null", "schedule=constant"]
LIMIT_S = 90


@pytest.mark.parametrize(
    ("number", "engine"),
    [
        (signal.SIGUSR1, "ddp"),
        pytest.param(signal.SIGINT, "fsdp2", marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, "zero2", marks=pytest.mark.slow),
    ],
)
def test_a_signal_to_one_rank_stops_all_of_them_with_a_checkpoint(
    number: signal.Signals, engine: str, corpus: Path, tmp_path: Path
) -> None:
    words = small(corpus, tmp_path, *BASE, "world_size=2", f"engine={engine}", "checkpoint.every=100")
    assert trained([*words, "name=whole"], 2, tmp_path / "whole.txt") == [0, 0]
    training = Training([*words, "name=cut"], 2, tmp_path / "cut.txt")
    run = tmp_path / "default" / "cut"
    wait_for_step(run, 4)
    training.kill(number, ranks=[1])
    assert training.wait() == [0, 0], training.said()
    now = status(run)
    assert now["state"] == "interrupted"
    assert (run / "REQUEUE").read_text() == f"{now['step']}\n"
    assert assert_whole(run) == [now["step"]]
    assert trained([*words, "name=cut"], 2, tmp_path / "cut.txt") == [0, 0]
    assert not (run / "REQUEUE").exists()
    assert json.loads((run / "summary.json").read_text())["resumed_from"] == [now["step"]]
    assert_same(tmp_path / "default" / "whole", run, STEPS)


def test_the_same_signal_twice_at_once_is_one_wish(corpus: Path, tmp_path: Path) -> None:
    """SLURM signals the processes, and so does the launcher that it signals as well."""
    training = Training(small(corpus, tmp_path, *ENDLESS, "name=run"), 1, tmp_path / "said.txt")
    wait_for_step(tmp_path / "default" / "run", 2)
    for _ in range(3):
        training.kill(signal.SIGTERM)
    assert training.wait() == [0]
    assert len(assert_whole(tmp_path / "default" / "run")) == 1


def test_a_time_limit_ends_with_a_checkpoint_before_it_is_over(corpus: Path, tmp_path: Path) -> None:
    words = small(corpus, tmp_path, *ENDLESS, "name=run", "time_limit=14s")
    import_once()
    begin = time.monotonic()
    assert trained(words, 1, tmp_path / "said.txt") == [0]
    assert time.monotonic() - begin < 14
    run = tmp_path / "default" / "run"
    now = status(run)
    assert now["state"] == "interrupted"
    assert "time_limit" in now["attempts"][-1]["reason"]
    assert assert_whole(run) == [now["step"]]


@pytest.mark.slow
@pytest.mark.launch
def test_a_second_signal_ends_a_run_that_hangs_and_harms_no_checkpoint(corpus: Path, tmp_path: Path) -> None:
    words = small(corpus, tmp_path, *ENDLESS, "world_size=2", "checkpoint.every=2", "name=run")
    command = [sys.executable, "-m", "harness.cli", "train", *words]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    run = tmp_path / "default" / "run"
    wait_for_checkpoint(run, 4)
    (stuck,) = [
        p for p in psutil.Process(process.pid).children(recursive=True) if p.name() == "optbench-rank1"
    ]
    stuck.suspend()
    process.send_signal(signal.SIGTERM)
    time.sleep(3.5)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 75, output
    assert "stopped at once" in status(run)["attempts"][-1]["reason"]
    assert assert_whole(run) != []


# `make test` has USR1 from a real SLURM (tests/slurm).
@pytest.mark.slow
@pytest.mark.launch
def test_usr1_to_every_process_of_a_step_as_slurm_sends_it(corpus: Path, tmp_path: Path) -> None:
    """With the launcher told to ignore it, as a batch script has to; without that, it dies of it."""
    words = small(corpus, tmp_path, *ENDLESS, "world_size=2", "name=run")
    flags = "--multi_gpu --num_machines 1 --num_processes 2 --mixed_precision no --dynamo_backend no"
    launch = f"exec {sys.executable} -m accelerate.commands.launch {flags} --main_process_port 29717 -m harness.train"
    process = subprocess.Popen(
        ["bash", "-c", f'trap "" USR1; {launch} "$@"', "step", *words],
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    run = tmp_path / "default" / "run"
    wait_for_step(run, 2)
    # The launcher puts its processes into sessions of their own; SLURM signals by job step, whatever the session.
    for member in [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]:
        member.send_signal(signal.SIGUSR1)
    output, _ = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 0, output
    assert (run / "REQUEUE").exists()
    assert assert_whole(run) == [status(run)["step"]]


@pytest.mark.slow
@pytest.mark.launch
def test_sigterm_under_torchrun(corpus: Path, tmp_path: Path) -> None:
    words = small(corpus, tmp_path, *ENDLESS, "world_size=2", "name=run")
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc-per-node=2",
            "--master-port=29719",
            "-m",
            "harness.train",
            *words,
        ],
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    run = tmp_path / "default" / "run"
    wait_for_step(run, 2)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=LIMIT_S)
    # torchrun's own exit code says nothing: it reports the signal that it got, whatever its processes made of it.
    assert status(run)["state"] == "interrupted"
    assert (run / "REQUEUE").exists()
    assert assert_whole(run) == [status(run)["step"]]
