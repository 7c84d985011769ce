"""SIGKILL at random moments, also inside of a save: what is resumed ends as what was never killed."""

from __future__ import annotations

import random
import signal
import time
from pathlib import Path

import pytest

from harness.checkpoint.store import Store
from tests.faults.checkpoints import assert_same, assert_whole, status
from tests.faults.forked import Training, trained
from tests.harness.running import small

ROUNDS_HERE, ROUNDS_NIGHTLY = 5, 50
ENGINES = {
    "single": ["world_size=1"],
    "ddp": ["world_size=2", "engine=ddp"],
    "fsdp2": ["world_size=2", "engine=fsdp2"],
    "zero1": ["world_size=2", "engine=zero1"],
    "zero3": ["world_size=2", "engine=zero3"],
}
RULE = ["optimizer=sumo", "optimizer.rank=8", "optimizer.refresh_interval=7", "optimizer.lr=0.01"]


def rounds(engine: str, count: int, corpus: Path, folder: Path, seed: int) -> tuple[int, int]:
    """Kill a run ``count`` times and let it end; how many kills were inside of a save, how many steps were lost."""
    steps = 12 * count
    words = small(
        corpus,
        folder,
        *ENGINES[engine],
        *RULE,
        f"steps={steps}",
        "checkpoint.every=3",
        "eval.every=null",
        "moments.every=null",
    )
    world = 1 if engine == "single" else 2
    assert trained([*words, "name=whole"], world, folder / "whole.txt", timeout_s=600) == [0] * world
    run, whole = folder / "default" / "killed", folder / "default" / "whole"
    generator = random.Random(seed)
    inside = lost = 0
    for number in range(count):
        training = Training([*words, "name=killed"], world, folder / "killed.txt")
        _wait_for_rows(run, training, number + 1)
        # On a slow machine the other kills may all come before the first checkpoint has its name.
        until = time.monotonic() + 60
        while number == count - 2 and not Store(run).steps() and time.monotonic() < until:
            time.sleep(0.005)
        # Every other time while there is an unfinished save; else whenever.
        if number % 2:
            until = time.monotonic() + 5
            while not list(run.glob("checkpoints/.*.partial")) and time.monotonic() < until:
                time.sleep(0.0005)
        else:
            time.sleep(generator.uniform(0.0, 0.4))
        training.kill(signal.SIGKILL)
        training.wait()
        inside += bool(list(run.glob("checkpoints/.*.partial")))
        done = status(run)["step"]
        saved = assert_whole(run)
        lost = max(lost, done - (saved[0] if saved else 0))
    assert trained([*words, "name=killed"], world, folder / "killed.txt", timeout_s=600) == [0] * world
    attempts = status(run)["attempts"]
    assert len(attempts) == count + 1
    assert any(attempt["first_step"] for attempt in attempts), "nothing was ever resumed"
    assert_same(whole, run, steps)
    return inside, lost


def _wait_for_rows(run: Path, training: Training, attempt: int) -> None:
    until = time.monotonic() + 60
    while time.monotonic() < until and any(p.is_alive() for p in training.processes):
        try:
            now = status(run)
        except (OSError, ValueError):
            now = {"attempts": [], "step": 0}
        if len(now["attempts"]) == attempt and now["step"] > now["attempts"][-1]["first_step"]:
            return
        time.sleep(0.005)
    raise AssertionError(f"no rows: {training.said()[-2000:]}")


@pytest.mark.parametrize("engine", ["single", pytest.param("ddp", marks=pytest.mark.slow)])
def test_a_run_that_is_killed_again_and_again_loses_nothing(
    engine: str, corpus: Path, tmp_path: Path
) -> None:
    _, lost = rounds(engine, ROUNDS_HERE, corpus, tmp_path, seed=1)
    # A checkpoint every 3 steps, written beside the next ones, named two steps after it is written, and a row every
    # other step.
    assert lost <= 9


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("engine", list(ENGINES))
def test_fifty_times(engine: str, corpus: Path, tmp_path: Path) -> None:
    inside, lost = rounds(engine, ROUNDS_NIGHTLY, corpus, tmp_path, seed=2)
    assert inside >= ROUNDS_NIGHTLY // 5, "too few kills were inside of a save to tell anything"
    assert lost <= 20
