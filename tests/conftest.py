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


POOLS = {"two_ranks", "four_ranks", "pools"}
"""Fixtures of warm rank processes, which cost seconds of every core when they start."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give each test process whole files; what shares rank pools, or the SLURM cluster, goes to one process.

    The longest group comes first: at the end it would keep one process busy, alone.
    """
    in_pools = {item.path for item in items if POOLS.intersection(getattr(item, "fixturenames", ()))}
    for item in items:
        is_slurm = item.path.parent.name == "slurm"
        group = "slurm" if is_slurm else "pools" if item.path in in_pools else str(item.path)
        item.add_marker(pytest.mark.xdist_group(group))
    items.sort(key=lambda item: (item.path.parent.name != "slurm", item.path not in in_pools))


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
