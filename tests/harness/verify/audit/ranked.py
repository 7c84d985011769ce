"""The rank pool of the tests with the calls of its base class, which name functions by their modules."""

from __future__ import annotations

from typing import Any

from harness.verify import pool as pools
from tests.distributed.pool import RankPool


class Ranks:
    """Call "module:function" on the ranks of a test pool."""

    def __init__(self, pool: RankPool) -> None:
        self._pool = pool

    def run(self, target: str, *args: Any, what: str = "", timeout_s: float = 60.0) -> list[Any]:
        return pools.RankPool.run(self._pool, target, *args, what=what, timeout_s=timeout_s)

    def close(self, kill: bool = False) -> None:
        self._pool.close(kill=kill)
