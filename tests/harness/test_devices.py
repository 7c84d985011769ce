"""Which device a process takes. A GPU cannot exist on this machine: torch's answers about it are stood in for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import harness
from harness.devices import claim_gpu, uses_cuda
from harness.errors import InputError


@pytest.fixture
def claimed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Two GPUs; returns those that are made current."""
    current: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    return current


@pytest.mark.parametrize(("flag", "expected"), [(None, True), ("true", False), ("1", False), ("false", True)])
def test_the_environment_can_ask_for_the_cpu(flag: str | None, expected: bool, claimed: list[int]) -> None:
    assert uses_cuda({} if flag is None else {"ACCELERATE_USE_CPU": flag}) is expected


def test_one_function_decides_where_training_runs() -> None:
    """Others may ask torch what this machine has: the doctor, and the check of a job's nodes."""
    package = Path(harness.__file__).parent
    asking = {path.name for path in package.rglob("*.py") if "cuda.is_available(" in path.read_text()}
    assert asking == {"devices.py", "doctor.py", "preflight.py"}


def test_without_a_gpu_nothing_asks_for_it() -> None:
    assert not uses_cuda({})


def test_a_process_takes_the_gpu_of_its_local_rank(claimed: list[int]) -> None:
    claim_gpu({"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"})
    claim_gpu({})
    assert claimed == [1, 0]


@pytest.mark.parametrize(
    "environ",
    [
        {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "4"},
        {"LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "3"},
        {"LOCAL_RANK": "2"},  # one visible GPU in each process, as some SLURM options give
    ],
)
def test_two_processes_never_share_a_gpu(environ: dict[str, str], claimed: list[int]) -> None:
    with pytest.raises(InputError, match=r"2 GPU\(s\): one process needs one GPU.*world_size=2"):
        claim_gpu(environ)
    assert claimed == []


def test_one_visible_gpu_in_each_process_is_explained(
    claimed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(InputError, match="not srun --gpus-per-task=1"):
        claim_gpu({"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"})
