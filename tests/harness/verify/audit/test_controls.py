"""Controls: every defect is detected where it is active, and its right counterpart is safe in the same cell."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.verify.audit import ranks
from harness.verify.audit.controls import CONTROLS, LOOP_DEFECTS, Control
from harness.verify.audit.defects import DEFECTS
from harness.verify.audit.document import CellReport
from harness.verify.audit.loop_defects import CHANGES
from harness.verify.audit.session import cell_report
from harness.verify.audit.targets import Target
from tests.distributed.pool import RankPool
from tests.harness.verify.audit.ranked import Ranks

QUICK = (
    "plain SGD under Muon's name",
    "whole QKV orthogonalized",
    "unsynchronized basis, replicas",
    "gradients halved",
)


def run(
    pool: RankPool, control: Control, target: Target, loop_defect: str | None, folder: Path
) -> CellReport:
    measured = ranks.measure_class(target)
    path = folder / "trajectory.pt"
    return cell_report(
        Ranks(pool), control.cell, target, measured, path, ranks.judge_cell, loop_defect=loop_defect
    )


def params() -> list[object]:
    return [
        pytest.param(control, id=control.name, marks=[] if control.name in QUICK else [pytest.mark.slow])
        for control in CONTROLS
    ]


@pytest.mark.parametrize("control", params())
def test_a_defect_is_detected(control: Control, two_ranks: RankPool, tmp_path: Path) -> None:
    report = run(two_ranks, control, control.target, control.loop_defect, tmp_path)
    assert report.verdict == "wrong", report.reason
    assert report.reason


@pytest.mark.slow
@pytest.mark.parametrize("control", params())
def test_its_right_counterpart_is_safe(control: Control, two_ranks: RankPool, tmp_path: Path) -> None:
    if control.name == "flat parameters routed to AdamW":
        pytest.skip("no client optimizer is given whole matrices there")
    target = Target(control.target.name, {**control.target.arguments, "when": "never"})
    report = run(two_ranks, control, target, None, tmp_path)
    assert report.verdict == "safe", (report.replay_error, report.noise_floor, report.reason)


def test_every_defect_has_a_control() -> None:
    assert {control.name for control in CONTROLS} == {*DEFECTS, *LOOP_DEFECTS}
    assert set(CHANGES) == set(LOOP_DEFECTS)
