"""The stages of the GPU check run on a CPU in quick mode; what needs CUDA says so."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

import optimizers
from benchmarks.gpu_check.record import Check, StageContext, StageRecord
from benchmarks.gpu_check.registry import STAGES
from benchmarks.gpu_check.runs import StepLog, assembled
from benchmarks.gpu_check.stages import attention, environment, memory, polar_methods, presets


def context(folder: Path) -> StageContext:
    return StageContext(StageRecord(name="stage", title=""), folder / "stage.json", "cpu", True, folder)


def run(module: Any, folder: Path) -> dict[str, Check]:
    """Run a stage in this process and return its checks by name; all are on the disk."""
    module.run(context(folder))
    record = StageRecord.load(folder / "stage.json")
    assert record is not None
    assert len({check.name for check in record.checks}) == len(record.checks)
    return {check.name: check for check in record.checks}


def raised(checks: dict[str, Check]) -> list[str]:
    """Return checks that failed by an exception rather than by a figure."""
    return [f"{check.name}: {check.reason}" for check in checks.values() if "Error" in check.reason]


def test_the_stages_are_there_and_their_limits_leave_room_for_each_other() -> None:
    for stage in STAGES:
        module, function = stage.target.split(":")
        assert callable(getattr(import_module(module), function))
    assert len({stage.name for stage in STAGES}) == len(STAGES)
    assert max(stage.limit_s for stage in STAGES) < 720 / 2


def test_the_environment_is_described(tmp_path: Path) -> None:
    checks = run(environment, tmp_path)
    assert checks["machine"].figures["device"] == "cpu"
    assert checks["bf16 peak"].status == "not run"


def test_steps_of_a_preset_are_measured_and_a_read_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(optimizers, "PRESETS", {"sumo": optimizers.PRESETS["sumo"]})
    checks = run(presets, tmp_path)
    assert raised(checks) == []
    assert checks["sumo: steps"].status == "passed"
    ordinary, refresh = (
        checks[f"sumo: {kind} step"].figures["operators"] for kind in ("ordinary", "refresh")
    )
    # The refresh is in the step that the stage takes for it: there it costs sketches and products with them.
    assert isinstance(ordinary, int)
    assert isinstance(refresh, int)
    assert refresh > 1.5 * ordinary
    # The sync counter's negative control.
    control = checks["control: a read is counted"]
    assert control.status == "passed"
    assert control.figures["reading"] == int(str(control.figures["clean"])) + 1


def test_polar_methods_are_judged(tmp_path: Path) -> None:
    checks = run(polar_methods, tmp_path)
    assert raised(checks) == []
    assert checks["gram: accuracy"].status == checks["gram: cut"].status == "passed"


def test_a_factor_that_keeps_what_the_cut_drops_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = {"gram": lambda m, cut: optimizers.polar(m, "gram", cut / 1e4).factor}
    monkeypatch.setattr(polar_methods, "METHODS", wrong)
    assert run(polar_methods, tmp_path)["gram: cut"].status == "failed"


def test_the_attention_kernel_is_named(tmp_path: Path) -> None:
    with assembled(context(tmp_path), "optimizer=adamw", "steps=5") as run_:
        log = StepLog(run_, tmp_path, traced=3)
        log.train()
    assert "scaled_dot_product" in attention.attention_kernels(log.trace())[0]


def test_memory_is_compared_with_the_plan(tmp_path: Path) -> None:
    checks = run(memory, tmp_path)
    assert raised(checks) == []
    assert checks["adamw: kinds"].status == "passed"
    assert checks["adamw: phases"].status == "not run"


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "marked_tests",
        "presets",
        "attention",
        "step_times",
        "loss_and_compile",
        "launching",
        "features",
        "processes",
    ],
)
def test_the_other_stages_run_on_a_cpu(name: str, tmp_path: Path) -> None:
    module = import_module(f"benchmarks.gpu_check.stages.{name}")
    assert raised(run(module, tmp_path)) == []
