"""Disks that are full, folders that cannot be written, files that shrink, processes that hang."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness.preparation import prepare
from tests.faults.checkpoints import assert_same, assert_whole, status, wait_for_checkpoint, wait_for_step
from tests.faults.forked import Training, trained
from tests.harness.running import small

ENDLESS = ["steps=100000", "eval.every=null", "moments.every=null", "schedule=constant", "name=run"]


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_disk_that_refuses_checkpoints_lets_the_steps_be_done_and_the_run_fail(
    ranks: int, corpus: Path, tmp_path: Path
) -> None:
    """The kernel's own refusal in the middle of a write (EFBIG stands for ENOSPC: a full disk cannot be had without
    mounting one). Where the disk takes the file again, the same command finishes the run."""
    words = small(corpus, tmp_path, "steps=6", "checkpoint.every=2", f"world_size={ranks}", "name=run")
    prepare(words, say=lambda text: None)  # the corpus, which is larger than the limit
    limits = {"RLIMIT_FSIZE": 100_000}  # a checkpoint has 500 kB, every other file less than 40
    assert trained(words, ranks, tmp_path / "said.txt", limits=limits) == [3] * ranks
    run = tmp_path / "default" / "run"
    assert status(run)["state"] == "failed"
    assert status(run)["step"] == 6
    assert "checkpoint of step 6 could not be written" in status(run)["attempts"][-1]["reason"]
    assert json.loads((run / "summary.json").read_text())["state"] == "failed"
    assert not (run / "DONE").exists()
    said = (tmp_path / "said.txt").read_text()
    assert "checkpoint of step 2 failed on rank 0" in said
    assert "File too large" in said
    assert list((run / "checkpoints").iterdir()) == []
    assert trained(words, ranks, tmp_path / "again.txt") == [0] * ranks
    assert status(run)["state"] == "finished"
    assert (run / "DONE").exists()
    assert assert_whole(run) == [6, 4]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 400 kB: less than a checkpoint of 500 kB, enough for every other file of a run."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no disk can be mounted here")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_full_disk_at_the_last_step_and_the_same_command_on_a_larger_one(
    small_disk: Path, corpus: Path, tmp_path: Path
) -> None:
    words = small(corpus, small_disk, "steps=4", "name=run", f"data.cache_dir={tmp_path / 'cache'}")
    said = tmp_path / "said.txt"
    assert trained(words, 1, said) == [3], said.read_text()
    run = small_disk / "default" / "run"
    assert status(run)["state"] == "failed"
    assert "it needs 0.000" in status(run)["attempts"][-1]["reason"]
    assert "continues from the beginning" in status(run)["attempts"][-1]["reason"]
    assert not (run / "DONE").exists()
    subprocess.run(["mount", "-o", "remount,size=8m", str(small_disk)], check=True)
    assert trained(words, 1, said) == [0], said.read_text()
    assert assert_whole(run) == [4]
    assert (run / "DONE").exists()


def test_a_disk_without_room_for_the_corpus_is_one_clear_line(corpus: Path, tmp_path: Path) -> None:
    words = small(corpus, tmp_path, "name=run", f"data.cache_dir={tmp_path / 'cache'}")
    assert trained(words, 1, tmp_path / "said.txt", limits={"RLIMIT_FSIZE": 10_000}) == [2]
    last = (tmp_path / "said.txt").read_text().splitlines()[-1]
    assert last.startswith("data.cache_dir: ")
    assert "cannot be written (File too large)" in last
    assert not (tmp_path / "default").exists()


def test_older_checkpoints_outlive_a_disk_that_fills_up(corpus: Path, tmp_path: Path) -> None:
    words = small(corpus, tmp_path, *ENDLESS, "checkpoint.every=4", "checkpoint.keep=1")
    run = tmp_path / "default" / "run"
    first = Training(words, 1, tmp_path / "first.txt")
    wait_for_checkpoint(run, 8, first.output)
    first.kill(signal.SIGKILL)
    first.wait()
    before = assert_whole(run)
    second = Training(words, 1, tmp_path / "second.txt", {"RLIMIT_FSIZE": 100_000})
    wait_for_step(run, before[0] + 12, second.output)
    second.kill(signal.SIGTERM)
    assert second.wait() == [0]
    assert assert_whole(run) == before


def test_a_folder_that_cannot_be_written_ends_nothing(corpus: Path, tmp_path: Path) -> None:
    """A file in its place: the tests may run as root, whom permissions do not stop."""
    words = small(corpus, tmp_path, *ENDLESS, "checkpoint.every=3")
    training = Training(words, 1, tmp_path / "said.txt")
    run = tmp_path / "default" / "run"
    wait_for_step(run, 4, training.output)
    os.replace(run / "checkpoints", run / "elsewhere")
    (run / "checkpoints").write_text("in the way")
    now = status(run)["step"]
    wait_for_step(run, now + 10, training.output)
    training.kill(signal.SIGTERM)
    assert training.wait() == [0], training.said()
    assert "no checkpoint" in training.said() or "failed" in training.said()


def test_a_corpus_that_is_cut_short_stops_the_run_and_says_which(corpus: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    words = small(corpus, tmp_path, "steps=60", "checkpoint.every=3", "name=run", f"data.cache_dir={cache}")
    assert trained([*words[:-2], "name=whole", words[-1]], 1, tmp_path / "whole.txt") == [0]
    training = Training(words, 1, tmp_path / "said.txt")
    run = tmp_path / "default" / "run"
    wait_for_checkpoint(run, 3, training.output)
    (tokens,) = cache.glob("*/tokens.bin")
    shutil.copy(tokens, tmp_path / "kept")
    os.truncate(tokens, tokens.stat().st_size // 2)
    assert training.wait() == [1], training.said()
    assert status(run)["state"] == "failed"
    assert "tokens.bin had" in status(run)["attempts"][-1]["reason"]
    assert assert_whole(run)
    shutil.copy(tmp_path / "kept", tokens)
    assert trained(words, 1, tmp_path / "again.txt") == [0]
    assert status(run)["attempts"][-1]["first_step"] > 0
    assert_same(tmp_path / "default" / "whole", run, 60)


@pytest.mark.parametrize("engine", ["ddp", pytest.param("fsdp2", marks=pytest.mark.slow)])
def test_a_rank_that_hangs_ends_the_others_in_time_and_is_named(
    engine: str, corpus: Path, tmp_path: Path
) -> None:
    words = small(
        corpus,
        tmp_path,
        *ENDLESS,
        "world_size=2",
        f"engine={engine}",
        # Long enough for several missed signs of life of 2 s: a process is called silent after more than two.
        "engine.timeout_s=10",
        "checkpoint.every=3",
    )
    training = Training(words, 2, tmp_path / "said.txt")
    run = tmp_path / "default" / "run"
    wait_for_checkpoint(run, 3, training.output)
    begin = time.monotonic()
    training.kill(signal.SIGSTOP, ranks=[1])
    training.processes[0].join(30)
    assert training.processes[0].exitcode == 1
    assert time.monotonic() - begin < 25
    training.kill(signal.SIGKILL, ranks=[1])
    training.wait()
    now = status(run)
    assert now["state"] == "failed"
    assert "rank 1 sent no heartbeat" in now["attempts"][-1]["reason"]
    assert "rank 0" not in now["attempts"][-1]["reason"]
    assert assert_whole(run)
