"""Certify a list of cells: pools of ranks, one after the other, and what came out. Torch-free."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.record.certificates import Cell, sources_sha256
from harness.verify import cells, verdict
from harness.verify.pool import RankLost, RankPool, RanksFailed
from harness.verify.verdict import Result

Say = Callable[[Result, int, int], None]
"""Told each result with how many there are and will be."""


@dataclass(frozen=True)
class Certified:
    """What a session found.

    Attributes:
        results: one a cell, in the order of the cells.
        machine: versions, cores, threads; no host name.
        seconds: that it all took.
        sources: hash of the sources; None: they were changed meanwhile.
    """

    results: list[Result]
    machine: dict[str, Any]
    seconds: float
    sources: str | None = None

    @property
    def passed(self) -> bool:
        """Every cell is green and every control red; peers don't count."""
        counted = [result for result in self.results if not result.cell.is_peer]
        return all(result.passed != bool(result.cell.control) for result in counted)


def certify(chosen: Sequence[Cell], folder: Path, say: Say) -> Certified:
    """Run all cells, world size by world size, each in its own pool of warm processes.

    Args:
        chosen: cells, controls and peers.
        folder: scratch.
        say: told each result as it comes.

    Raises:
        RankLost: a rank died or hung.
    """
    began, sources = time.monotonic(), sources_sha256()
    session = _Session(folder)
    done: dict[Cell, Result] = {}
    with session.pool(1) as pool:
        machine = pool.run("harness.verify.cell:machine")[0]
        session.save_references(pool, chosen)
        alone = [cell for cell in chosen if cell.world_size == 1]
        for result in session.results(pool, alone):
            done[result.cell] = result
            say(result, len(done), len(chosen))
    for world_size in sorted({cell.world_size for cell in chosen} - {1}):
        with session.pool(world_size) as pool:
            for result in session.results(pool, [cell for cell in chosen if cell.world_size == world_size]):
                done[result.cell] = result
                say(result, len(done), len(chosen))
    # Ranks import modules when they need them: results under two versions certify neither.
    known = sources if sources == sources_sha256() else None
    return Certified([done[cell] for cell in chosen], machine, time.monotonic() - began, known)


class _Session:
    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._pools = 0
        self._references: dict[Cell, Path] = {}

    @contextmanager
    def pool(self, world_size: int) -> Iterator[_Box]:
        """A pool, in a box, because a cell that breaks it is followed by a new one."""
        box = _Box(self._new_pool(world_size), lambda: self._new_pool(world_size))
        try:
            yield box
        finally:
            box.close()

    def _new_pool(self, world_size: int) -> RankPool:
        self._pools += 1
        return RankPool(world_size, self._folder / f"pool{self._pools}", "harness.verify.cell:start")

    def save_references(self, pool: _Box, chosen: Iterable[Cell]) -> None:
        """What one fp32 process makes of each (rule, clipping)."""
        for number, cell in enumerate(sorted({cells.reference_of(c) for c in chosen})):
            path = self._folder / f"reference{number}.pt"
            what = f"one process as the reference, {cell}"
            try:
                pool.run("harness.verify.cell:save_reference", cell, self._folder, path, what=what)
            except RanksFailed as error:
                raise RankLost(str(error)) from None
            self._references[cell] = path

    def results(self, pool: _Box, chosen: Iterable[Cell]) -> Iterable[Result]:
        for cell in chosen:
            began = time.monotonic()
            try:
                target = "harness.verify.peers:certify" if cell.is_peer else "harness.verify.cell:certify"
                reference = self._references[cells.reference_of(cell)]
                ranks = pool.run(target, cell, self._folder, reference, what=str(cell))
            except RanksFailed as error:
                yield verdict.crashed(cell, str(error), time.monotonic() - began)
            else:
                yield verdict.judge(cell, ranks, time.monotonic() - began)


class _Box:
    def __init__(self, pool: RankPool, renew: Callable[[], RankPool]) -> None:
        self._pool, self._renew = pool, renew

    def run(self, target: str, *args: Any, what: str = "") -> list[Any]:
        if not self._pool.is_open:
            self._pool = self._renew()
        try:
            return self._pool.run(target, *args, what=what)
        except RanksFailed:
            # What an engine did to these processes was not undone.
            self._pool.close(kill=True)
            raise

    def close(self) -> None:
        self._pool.close()
