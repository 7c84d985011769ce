"""Two processes with NCCL (on a CPU: gloo) train the weights of one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.gpu_check.record import StageContext, StageRecord
from benchmarks.gpu_check.stages.processes import TOLERANCE, largest_error, trained_weights


@pytest.mark.slow
def test_two_processes_train_the_weights_of_one(tmp_path: Path, gpu_device: torch.device) -> None:
    if gpu_device.type == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    record = StageRecord(name="processes", title="")
    context = StageContext(record, tmp_path / "stage.json", gpu_device.type, True, tmp_path)
    one = trained_weights(context, 1, "single")
    assert largest_error(context, one, trained_weights(context, 2, "ddp")) < TOLERANCE
