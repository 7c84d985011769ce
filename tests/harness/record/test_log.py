"""What the log says beside rows: a process that all others wait for."""

from __future__ import annotations

import pytest

from harness.protocols import MetricRow
from harness.record.log import SLOW, SLOW_ROWS, Log, ProgressSink


def said(ratios: list[tuple[float | None, int]]) -> list[str]:
    lines: list[str] = []
    sink = ProgressSink(Log(lines.append, silent=True), steps=100)
    for step, (ratio, rank) in enumerate(ratios, start=1):
        row: MetricRow = {"step": step, "train/loss": 1.0, "throughput/tokens_per_s": 1.0, "wall_s": 1.0}
        sink.write({**row, "balance/ratio": ratio, "balance/slowest_rank": rank})
    return [line for line in lines if "is slow" in line]


@pytest.mark.parametrize(
    ("ratios", "times"),
    [
        ([(SLOW, 3)] * SLOW_ROWS, 1),
        ([(2.0, 3)] * 9, 1),
        ([(SLOW, 3)] * (SLOW_ROWS - 1), 0),
        ([(SLOW - 0.1, 3)] * 9, 0),
        ([(2.0, 3), (2.0, 1)] * 5, 0),
        ([(2.0, 3), (None, 0), (2.0, 3), (2.0, 3)], 1),
        ([(2.0, 3), (1.0, 3), (2.0, 3), (2.0, 3)], 0),
    ],
)
def test_a_slow_rank_is_named_once_it_is_slow_for_some_rows(
    ratios: list[tuple[float | None, int]], times: int
) -> None:
    lines = said(ratios)
    assert len(lines) == times
    assert all(line.startswith("rank 3 is slow") for line in lines)
