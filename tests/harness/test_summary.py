"""What the rows of a run come to."""

from __future__ import annotations

import pytest

from harness import summary
from harness.protocols import MetricRow


def _row(step: int, optimizer_s: float, probes_s: float = 0.0) -> MetricRow:
    return {"step": step, "time/optimizer_s": optimizer_s, "time/data_s": 0.001, "time/probes_s": probes_s}


def test_times_are_weighted_by_steps_and_leave_the_first_row_out() -> None:
    rows = [_row(1, 100.0), _row(10, 0.1), _row(11, 1.0), _row(20, 0.1)]
    # 9 and 9 steps of 0.1 s and one of 1.0 s: a median would hide the refresh.
    assert summary.mean_times(rows)["optimizer"] == pytest.approx((18 * 0.1 + 1.0) / 19)
    assert summary.mean_times(rows)["communication"] is None


def test_step_ms_leaves_probes_out() -> None:
    assert summary.step_ms([_row(1, 9.0), _row(5, 0.25, probes_s=3.0)]) == pytest.approx(251.0)


def test_a_run_of_one_row_has_its_times() -> None:
    assert summary.step_ms([_row(1, 0.5)]) == pytest.approx(501.0)
    assert summary.step_ms([]) is None


def test_medians_skip_what_is_not_finite() -> None:
    rows: list[MetricRow] = [
        {"val/loss": 1.0},
        {"val/loss": None},
        {"val/loss": float("nan")},
        {"val/loss": 3.0},
    ]
    assert summary.median(rows, "val/loss") == 2.0
    assert summary.median([], "val/loss") is None
