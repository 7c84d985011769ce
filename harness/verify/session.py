"""Certify a list of cells in pools of rank processes, one pool after the other. Torch-free."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.record.certificates import CROSSED, Cell, sources_sha256
from harness.verify import cells, verdict
from harness.verify.pool import RankLost, RankPool, RanksFailed
from harness.verify.verdict import Result

Say = Callable[[Result, int, int], None]
"""Receives each result with the number of results so far and of cells in all."""


Reports = tuple[Sequence[Mapping[str, Any]], float]
"""What the ranks of a cell reported, and the seconds that it took."""


@dataclass(frozen=True)
class Certified:
    """The results of a session.

    Attributes:
        results: one per cell, in the order of the cells.
        machine: versions, cores, threads; no host name.
        seconds: duration of the session.
        sources: hash of the sources; None: they changed during the session.
    """

    results: list[Result]
    machine: dict[str, Any]
    seconds: float
    sources: str | None = None

    @property
    def passed(self) -> bool:
        """Return True if every cell is green and every control red; peers don't count."""
        counted = [result for result in self.results if not result.cell.is_peer]
        return all(result.passed != bool(result.cell.control) for result in counted)


def certify(selected: Sequence[Cell], folder: Path, say: Say) -> Certified:
    """Certify all cells, world size by world size, each in its own pool of rank processes.

    Args:
        selected: cells, controls and peers.
        folder: scratch folder.
        say: receives each result as it comes.

    Raises:
        RankLost: a rank died or hung.
    """
    began, sources = time.monotonic(), sources_sha256()
    results: dict[Cell, Result] = {}
    waiting: dict[Cell, Reports] = {}
    references: dict[Cell, Path] = {}
    floors: dict[tuple[str, str], float | None] = {}
    machine: dict[str, Any] = {}
    # References are made by one process; all other cells need them.
    for world_size in sorted({1, *(cell.world_size for cell in selected)}):
        pool = RankPool(world_size, folder / f"ranks{world_size}", "harness.verify.certify_rank:start")
        with closing(pool):
            if world_size == 1:
                machine = pool.run("harness.verify.certify_rank:machine")[0]
                references = _save_references(pool, selected, folder)
                floors = _noise_floors(pool, selected, folder, references)
            for cell in (cell for cell in selected if cell.world_size == world_size):
                floor = (
                    floors.get((cells.reference_of(cell).rule, cell.dtype)) if has_noise_floor(cell) else None
                )
                result, reports = _certify(pool, cell, folder, references, floor)
                if reports and verdict.needs_twins(result):
                    waiting[cell] = reports
                    continue
                results[cell] = result
                say(result, len(results), len(selected))
    for cell, result in _with_twins(waiting, folder, references):
        results[cell] = result
        say(result, len(results), len(selected))
    # Ranks import modules when they need them: results under two versions certify neither.
    unchanged = sources if sources == sources_sha256() else None
    return Certified([results[cell] for cell in selected], machine, time.monotonic() - began, unchanged)


def _save_references(pool: RankPool, selected: Sequence[Cell], folder: Path) -> dict[Cell, Path]:
    """Train one fp32 process for each (rule, clipping) and return reference cell → file of its weights."""
    references = {}
    for number, cell in enumerate(sorted({cells.reference_of(cell) for cell in selected})):
        references[cell] = folder / f"reference{number}.pt"
        what = f"one process as the reference, {cell}"
        try:
            pool.run("harness.verify.certify_rank:save_reference", cell, folder, references[cell], what=what)
        except RanksFailed as error:
            raise RankLost(str(error)) from None
    return references


def has_noise_floor(cell: Cell) -> bool:
    """Return True if the twins of `_noise_floors` are of the cell's arithmetic, and their figure is the cell's, too.

    They clip, and have the preset's options and the factor of CPUs. How work and matrices are dealt out to the
    ranks changes neither.
    """
    variants = set(filter(None, cell.variant.split(", ")))
    return cell.clipping == "on" and not cell.options and variants <= {"columns", "split"}


def _noise_floors(
    pool: RankPool, selected: Sequence[Cell], folder: Path, references: Mapping[Cell, Path]
) -> dict[tuple[str, str], float | None]:
    """Return (rule, dtype) → end-to-end error between twins that start one ulp apart, clipped, at the preset's options.

    None where it is not finite, which JSON cannot say. In bf16, where the end-to-end error is not judged and a run
    takes seconds, of the rules of `CROSSED` alone.
    """
    pairs = {(cells.reference_of(cell).rule, cell.dtype) for cell in selected if has_noise_floor(cell)}
    floors: dict[tuple[str, str], float | None] = {}
    for rule, dtype in sorted(pairs):
        if dtype != "fp32" and rule not in CROSSED:
            continue
        cell = Cell(rule, "single", dtype, world_size=1)
        what = f"twins of one process, {cell}"
        try:
            args = (cell, folder, references.get(cell))
            floor = pool.run("harness.verify.certify_rank:noise_floor", *args, what=what)[0]
            floors[rule, dtype] = verdict.finite(floor)
        except RanksFailed:
            # The cells of this dtype fail for the same reason, and say it.
            pool.close(kill=True)
    return floors


def _with_twins(
    waiting: Mapping[Cell, Reports], folder: Path, references: Mapping[Cell, Path]
) -> Iterator[tuple[Cell, Result]]:
    """Yield the verdicts on cells whose end-to-end error may be what their rule makes of one ulp, at their options."""
    if not waiting:
        return
    with closing(RankPool(1, folder / "twins", "harness.verify.certify_rank:start")) as pool:
        for cell, (reports, seconds) in waiting.items():
            began, result = time.monotonic(), verdict.judge(cell, reports, seconds)
            floor = 0.0
            for seed in range(verdict.MOST_TWINS):
                floor = max(floor, _noise_floor(pool, cell, folder, references, seed))
                spent = seconds + time.monotonic() - began
                result = verdict.judge(cell, reports, spent, verdict.finite(floor))
                if not verdict.needs_twins(result):
                    break
            yield cell, result


def _noise_floor(
    pool: RankPool, cell: Cell, folder: Path, references: Mapping[Cell, Path], seed: int
) -> float:
    """Return what one twin of a cell's reference makes of one ulp."""
    reference = cells.reference_of(cell)
    args = (reference, folder, references[reference], seed)
    return pool.run(
        "harness.verify.certify_rank:noise_floor", *args, what=f"twins of one process, {reference}"
    )[0]


def _certify(
    pool: RankPool, cell: Cell, folder: Path, references: Mapping[Cell, Path], noise_floor: float | None
) -> tuple[Result, Reports | None]:
    """Return a cell's verdict, and the reports that it was judged by; None where it crashed."""
    began = time.monotonic()
    target = "harness.verify.peers:certify" if cell.is_peer else "harness.verify.certify_rank:certify"
    reference = references[cells.reference_of(cell)]
    try:
        reports = pool.run(target, cell, folder, reference, what=str(cell))
    except RanksFailed as error:
        # What an engine did to these processes was not undone: the next cell gets new ones.
        pool.close(kill=True)
        return verdict.crashed(cell, str(error), time.monotonic() - began), None
    seconds = time.monotonic() - began
    return verdict.judge(cell, reports, seconds, noise_floor), (reports, seconds)
