"""What the rows of a run come to."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from harness import summary
from harness.config.schema import RunConfig
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


SUMO = {"name": "sumo", "orthogonalizer": "dwh"}


@pytest.mark.parametrize(
    ("changes", "name", "part"),
    [
        ({"precision": "fp32"}, "NVIDIA H100 80GB HBM3", r"tensor cores unused \(67 of 989 TFLOP/s"),
        ({"precision": "fp32"}, "Some GPU", "tensor cores unused: precision=bf16"),
        ({"precision": "bf16"}, "Tesla V100-SXM2-16GB", "precision=bf16 is emulated"),
        ({"precision": "fp32", "tf32": True}, "NVIDIA H100 80GB HBM3", None),
        ({"precision": "bf16"}, "NVIDIA H100 80GB HBM3", None),
        (
            {"precision": "bf16", "optimizer": SUMO},
            "NVIDIA L4",
            "orthogonalizer=dwh .* at 1/64 of its fp32 rate",
        ),
        ({"precision": "bf16", "optimizer": SUMO}, "NVIDIA A100-SXM4-80GB", None),
        ({"precision": "bf16", "optimizer": SUMO}, "Some GPU", None),
        ({"precision": "bf16", "optimizer": {"name": "adamw"}}, "NVIDIA L4", None),
    ],
)
def test_a_slow_choice_on_a_gpu_is_said(
    changes: dict[str, Any], name: str, part: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: "V100" not in name)
    monkeypatch.setattr(summary, "cpu_cores", lambda: 64)
    lines = summary.gpu_warnings(RunConfig.model_validate(changes), name, peak_flops=1e15)
    assert len(lines) == (part is not None)
    assert part is None or re.search(part, lines[0])


def test_too_few_cores_for_a_gpu_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    monkeypatch.setattr(summary, "cpu_cores", lambda: 8)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    (line,) = summary.gpu_warnings(RunConfig(precision="bf16"), "H100", peak_flops=1e15)
    assert line.startswith("1 CPU core(s) a process")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert not summary.gpu_warnings(RunConfig(precision="bf16"), "H100", peak_flops=1e15)


def test_mixed_gpus_are_named_with_their_ranks() -> None:
    pcie = {"name": "H100 PCIe", "capability": "9.0"}
    sxm = {**pcie, "name": "H100 SXM"}
    assert summary.mixed_devices([pcie, pcie]) == []
    assert summary.mixed_devices([{"name": "cpu"}] * 2) == []
    (line,) = summary.mixed_devices([pcie, sxm, pcie])
    assert "H100 PCIe, compute capability 9.0: ranks 0, 2; H100 SXM, compute capability 9.0: ranks 1)" in line
