"""DDP's timers run in steps with a row only: elsewhere they would make the host wait for a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import patch

from torch.nn.parallel import DistributedDataParallel

from harness.engines.ddp import NEVER
from tests.distributed.pool import RankPool
from tests.harness.running import small, trained, write_documents


def _recorded(rank: int, words: list[str]) -> tuple[list[tuple[int, int]], list[int], list[dict[str, Any]]]:
    """Train; return (step, sample rate) of each change, the steps in which DDP's timers were read, and the rows."""
    rates: list[tuple[int, int]] = []
    reads: list[int] = []
    step_of = {}
    change, read = (
        DistributedDataParallel._set_ddp_runtime_logging_sample_rate,
        DistributedDataParallel._get_ddp_logging_data,
    )

    def watch(run: Any) -> None:
        step_of["run"] = run

    def step() -> int:
        return step_of["run"].state.step if step_of else -1

    def set_rate(model: Any, rate: int) -> None:
        rates.append((step(), rate))
        change(model, rate)

    def get_data(model: Any) -> Any:
        reads.append(step())
        return read(model)

    with (
        patch.object(DistributedDataParallel, "_set_ddp_runtime_logging_sample_rate", set_rate),
        patch.object(DistributedDataParallel, "_get_ddp_logging_data", get_data),
    ):
        return rates, reads, trained(rank, words, watch).rows


def test_ddp_samples_its_timers_in_steps_with_a_row(tmp_path: Path, two_ranks: RankPool) -> None:
    # More than the ten steps in which torch samples whatever the rate is.
    overrides = (
        "world_size=2",
        "engine=ddp",
        "steps=21",
        "log_every=8",
        "eval.every=21",
        "moments.every=null",
    )
    words = small(write_documents(tmp_path), tmp_path, *overrides)
    for rates, reads, rows in two_ranks.run(_recorded, words):
        # Rows are those of steps 1, 8, 16 and 21: the rate is 1 in these steps, and off in the next ones.
        assert rates == [
            (-1, NEVER),
            *((before, 1 if before in (0, 7, 15, 20) else NEVER) for before in (0, 1, 7, 8, 15, 16, 20)),
        ]
        assert reads == [1, 8, 16, 21]
        assert [row["step"] for row in rows] == reads
        assert all(row["time/communication_s"] > 0 for row in rows[1:])
