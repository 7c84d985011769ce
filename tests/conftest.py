"""Fixtures of all tests: no network, a corpus cache of their own, and the pools of warm ranks."""

from __future__ import annotations

import gc
import os
import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.pool import RankPool

# Set before any test module imports torch or a Hugging Face library.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"
os.environ["WANDB_SILENT"] = "true"
os.environ.pop("WANDB_API_KEY", None)


ROOT = Path(__file__).parents[1]
POOLS = {"two_ranks", "four_ranks", "pools"}
"""Fixtures of warm rank processes, which cost seconds of every core when they start."""


@cache
def group_of(path: str) -> str:
    """Return what must run in one test process: a file, the files that share rank pools, or the SLURM cluster.

    The files with pools are two groups, those of tests/distributed and the others, which take about as long.

    Args:
        path: of a test file, relative to the project.
    """
    if path.startswith("tests/slurm/"):
        return "slurm"
    words = re.findall(r"\w+", (ROOT / path).read_text(encoding="utf-8"))
    if not POOLS.intersection(words):
        return path
    return "pools of distributed" if path.startswith("tests/distributed/") else "pools"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest groups first: at the end they would keep one test process busy, alone.

    After the cluster, which mostly waits, and the pools come files that start programs.
    """
    groups = [group_of(item.nodeid.partition("::")[0]) for item in items]
    starting = {group for group, item in zip(groups, items) if item.get_closest_marker("launch")}
    shared = ("slurm", "pools of distributed", "pools")
    rank = {**dict.fromkeys(starting, 3), **{group: place for place, group in enumerate(shared)}}
    order = sorted(range(len(items)), key=lambda place: rank.get(groups[place], 4))
    items[:] = [items[place] for place in order]


def pytest_collection_finish() -> None:
    """Leave modules and tests out of garbage collections: a run that trains in a test process begins with one."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Give each test process whole groups.

    Not `--dist loadgroup`: it writes the group into a private attribute that pytest 9 no longer reads.
    """
    from xdist.scheduler import LoadScopeScheduling

    class GroupScheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group_of(nodeid.partition("::")[0])

    return GroupScheduling(config, log)


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
