"""Fixtures of all tests: no network, a corpus cache of their own, and the pools of warm ranks."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.distributed.pool import RankPool

# Set before any test module imports torch or a Hugging Face library.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"
os.environ["WANDB_SILENT"] = "true"
os.environ.pop("WANDB_API_KEY", None)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The file that takes longest first: with one file a worker it would keep one of two busy at the end, alone."""
    items.sort(key=lambda item: item.path.parent.name != "slurm")


@pytest.fixture(scope="session")
def session_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus cache that lives as long as the tests do, not the user's own."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def _own_cache(session_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPTBENCH_CACHE", str(session_cache))


@pytest.fixture(autouse=True)
def _no_process_group_is_left() -> Iterator[None]:
    """Fail the test that leaves a process group, instead of a later one in the same process."""
    yield
    if (dist := sys.modules.get("torch.distributed")) and dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
        pytest.fail("left torch.distributed initialized")


@pytest.fixture(scope="session")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RankPool]:
    """Two warm gloo processes."""
    pool = RankPool(2, tmp_path_factory.mktemp("pool"))
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def four_ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RankPool]:
    """Four warm gloo processes."""
    pool = RankPool(4, tmp_path_factory.mktemp("pool"))
    yield pool
    pool.close()
