"""Who is slow, seen by two real processes of which one is held up."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.harness.running import small, trained, write_documents

if TYPE_CHECKING:
    from tests.distributed.pool import RankPool


def hold_up(run: Any) -> None:
    """Process 1 takes a fifth of a second longer for each step's data, process 0 a tenth."""
    give = run.loader.micro_batches

    def step(number: int) -> Any:
        time.sleep(0.2 if run.engine.rank else 0.1)
        return give(number)

    run.loader.micro_batches = step


def held_up(rank: int, words: list[str]) -> Any:
    return trained(rank, words, hold_up).rows


@pytest.mark.parametrize(("engine", "is_told"), [("ddp", True), ("fsdp2", False)])
def test_the_slow_process_is_in_the_rows(
    engine: str, is_told: bool, tmp_path: Path, two_ranks: RankPool
) -> None:
    words = ["steps=6", "log_every=3", "eval.every=null", "world_size=2", f"engine={engine}"]
    rows = two_ranks.run(held_up, small(write_documents(tmp_path), tmp_path, *words))[0]
    told = [row for row in rows if row.get("balance/ratio") is not None]
    if not is_told:
        assert told == []
        return
    assert [row["step"] for row in told] == [3, 6]
    assert all(row["balance/slowest_rank"] == 1 for row in told)
    # 0.6 s against 0.3 s, and the forward passes of a busy machine on both sides.
    assert all(1.2 < row["balance/ratio"] < 2.5 for row in told)
