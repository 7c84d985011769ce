"""The device of the tests in this folder, which all need a GPU unless another device is asked for."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

_VARIABLE = "OPTBENCH_TEST_DEVICE"
"""Set to cpu, it exercises the code of these tests on a machine without a GPU."""
_HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of this folder, and skip them where there is no device for them."""
    wanted = os.environ.get(_VARIABLE, "cuda")
    for item in items:
        if _HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if wanted == "cuda" and not torch.cuda.is_available():
                reason = f"needs a CUDA device ({_VARIABLE}=cpu runs it on the CPU)"
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture
def gpu_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """The device under test: the first GPU, or what OPTBENCH_TEST_DEVICE names."""
    kind = os.environ.get(_VARIABLE, "cuda")
    if kind == "cpu":
        # Where there is a GPU, too: engines choose their device by themselves.
        monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
        yield torch.device("cpu")
        return
    yield torch.device(kind, 0)
    torch.cuda.set_sync_debug_mode("default")
    torch.cuda.empty_cache()
