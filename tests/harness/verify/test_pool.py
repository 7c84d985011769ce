"""Warm ranks: answers in order; what raises, dies or hangs is named within a bounded time."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from harness.devices import uses_cuda
from harness.process.parent import start_of
from harness.verify import pool as pools
from harness.verify.pool import RankLost, RankPool, RanksFailed

HERE = "tests.harness.verify.ranked"
ROOT = Path(__file__).parents[3]
COMMAND = """
import sys, tempfile
from contextlib import closing
from multiprocessing import forkserver
from pathlib import Path
from harness.process.termination import terminable
from harness.verify.pool import RankPool
with terminable(), tempfile.TemporaryDirectory(dir=sys.argv[1]) as folder:
    pool = RankPool(1, Path(folder), preload=["torch.distributed"])
    print(forkserver._forkserver._forkserver_pid, pool._processes[0].pid, flush=True)
    with closing(pool):
        pool.run("tests.harness.verify.ranked:spin_for_ever")
"""


@pytest.fixture
def pool(tmp_path: Path) -> Iterator[RankPool]:
    made = RankPool(2, tmp_path / "pool")
    yield made
    made.close()


def test_a_second_pool_in_a_folder_finds_no_keys_of_the_first(tmp_path: Path) -> None:
    for _ in range(2):
        with closing(RankPool(2, tmp_path / "pool")) as made:
            assert made.run(f"{HERE}:share", 5) == [(0, 15.0), (1, 15.0)]


def test_answers_come_by_rank_and_an_exception_everywhere_leaves_the_pool_usable(
    pool: RankPool, tmp_path: Path
) -> None:
    assert pool.run(f"{HERE}:share", 5) == [(0, 15.0), (1, 15.0)]
    with pytest.raises(RanksFailed, match="wrong everywhere") as caught:
        pool.run(f"{HERE}:raise_everywhere", what="a cell")
    # Whose exception came first is what is shown; both raise at once here.
    assert re.match(r"rank [01] of 2, a cell:\nTraceback", str(caught.value))
    assert pool.run(f"{HERE}:share", 1) == [(0, 3.0), (1, 3.0)]
    # Not the user's folder, whose ./configs would change what is certified; no GPU; one thread.
    expected = {"cwd": str(tmp_path / "pool"), "cuda": "", "threads": "1"}
    assert pool.run(f"{HERE}:read_environment") == [expected, expected]


def test_a_rank_that_dies_is_named(pool: RankPool) -> None:
    began = time.monotonic()
    with pytest.raises(RankLost, match=r"rank 1 of 2 died \(exit code 7\) in the cell"):
        pool.run(f"{HERE}:die_on_one", what="the cell")
    assert time.monotonic() - began < pools.GRACE_S + 10
    assert not pool.is_open


def test_a_rank_that_hangs_is_named_with_its_stack(pool: RankPool) -> None:
    with pytest.raises(RankLost, match=r"rank 1 of 2 gave no answer within 2 s in the cell") as caught:
        pool.run(f"{HERE}:hang_on_one", what="the cell", timeout_s=2)
    assert "in hang_on_one" in str(caught.value)
    assert not pool.is_open


def test_an_exception_on_one_rank_is_not_hidden_by_those_who_wait_for_it(
    pool: RankPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pools, "GRACE_S", 1)
    with pytest.raises(RanksFailed, match="wrong on one"):
        pool.run(f"{HERE}:raise_on_one", what="the cell")


def test_a_pool_that_cannot_start_says_why(tmp_path: Path) -> None:
    with pytest.raises(RankLost, match="No module named 'nowhere'"):
        RankPool(1, tmp_path / "pool", "nowhere:start")


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGKILL, marks=pytest.mark.slow)], ids=["term", "kill"]
)
def test_no_process_outlives_the_command(number: signal.Signals, tmp_path: Path) -> None:
    words = [sys.executable, "-c", COMMAND, str(tmp_path)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, cwd=ROOT) as command:
        assert command.stdout is not None
        left = {int(pid): start_of(int(pid)) for pid in command.stdout.readline().split()}
        try:
            assert len(left) == 2
            command.send_signal(number)
            assert command.wait(30) == (128 + number if number == signal.SIGTERM else -number)
            deadline = time.monotonic() + 20
            while alive := {pid for pid, start in left.items() if start and start_of(pid) == start}:
                assert time.monotonic() < deadline, f"processes {alive} are left"
                time.sleep(0.1)
        finally:
            command.kill()
            for pid, start in left.items():
                if start and start_of(pid) == start:
                    os.kill(pid, signal.SIGKILL)
    # Of SIGKILL no process hears.
    assert number == signal.SIGKILL or not list(tmp_path.iterdir())


def test_libraries_are_imported_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fork cannot use CUDA once the process that it was forked from has, and DeepSpeed asks when it is imported."""
    seen: list[bool] = []
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")

    def start() -> None:
        assert os.environ["CUDA_VISIBLE_DEVICES"] == ""
        seen.append(uses_cuda())

    monkeypatch.setattr(pools.forkserver, "ensure_running", start)
    assert uses_cuda()
    pools._preloaded(pools.PRELOADED)
    assert seen == [False]
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "1"
    assert "ACCELERATE_USE_CPU" not in os.environ
