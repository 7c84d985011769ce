"""Who is slow, seen by two real processes, of which the clock says that one is held up."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.harness.running import small, trained, write_documents

if TYPE_CHECKING:
    from tests.distributed.pool import RankPool


def hold_up(run: Any) -> None:
    """Let the clock say that process 1 took 0.75 s for data and forward passes, process 0 took 0.375 s.

    The seconds are set, not slept: on a busy machine each process may wait for the core longer than any sleep.
    """
    read = run.clock.peek

    def peek() -> dict[str, float]:
        factor = 2.0 if run.engine.rank else 1.0
        return {**read(), "data": 0.125 * factor, "forward": 0.25 * factor}

    run.clock.peek = peek


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
    assert all(row["balance/ratio"] == 2.0 for row in told)
