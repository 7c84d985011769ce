"""Replay a run and its twins in processes on this machine's CPUs, within a time that is checked first. Torch-free."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

from harness.errors import InputError
from harness.verify.diverge.envelope import amplification
from harness.verify.diverge.trajectory import Trajectory
from harness.verify.pool import RankPool
from harness.verify.twins import Twin

ULP_TWINS = 2
"""Twins that start one ulp apart, from which the growth of an ulp is read."""
_TARGET = "harness.verify.diverge.replays:replay"
_LIMIT_S = 3600.0
_WORKERS = 4

Say = Callable[[str], None]


@dataclass(frozen=True)
class Replayed:
    """A run and its twins.

    Attributes:
        run: undisturbed, in one process.
        twins: reordered ones, which make the envelope.
        growth: steps done → how many times one ulp has grown (`envelope.amplification`).
    """

    run: Trajectory
    twins: list[Trajectory]
    growth: dict[int, float]


def replay_with_twins(
    words: Sequence[str], steps: int, twins: int, folder: Path, say: Say, minutes: float | None = None
) -> Replayed:
    """Train the first steps of a run in one process, then those of its twins.

    Args:
        words: overrides of the run, in one process.
        steps: to train.
        twins: number of reordered twins; `ULP_TWINS` more start one ulp apart.
        folder: scratch folder.
        say: takes lines of progress.
        minutes: refuse to go on after the first replay if all would take longer; None: go on.

    Raises:
        InputError: it would take longer.
        RanksFailed, RankLost: a replay raised an exception, died or hung.
    """
    disturbances = [Twin(seed, reorders=True) for seed in range(1, twins + 1)]
    disturbances += [Twin(seed, moves_weights=True) for seed in range(1, ULP_TWINS + 1)]
    workers = max(1, min(_WORKERS, os.cpu_count() or 1))
    with ExitStack() as stack:
        free: SimpleQueue[RankPool] = SimpleQueue()
        first = stack.enter_context(closing(RankPool(1, folder / "replay0")))
        began = time.monotonic()
        run = first.run(_TARGET, list(words), steps, what="replay of RUN_A", timeout_s=_LIMIT_S)[0]
        seconds = (time.monotonic() - began) * len(disturbances) / workers
        say(
            f"{steps} steps of RUN_A replayed in {time.monotonic() - began:.0f} s; twins: about {seconds:.0f} s"
        )
        if minutes is not None and seconds > 60 * minutes:
            raise InputError(
                "--minutes",
                f"{minutes:g}",
                f"is not enough for {twins} twins of {steps} steps: about {seconds / 60:.0f} minutes",
                fix=f"--minutes {seconds / 60 * 1.5:.0f}, or fewer --steps",
            )
        free.put(first)
        for number in range(1, workers):
            free.put(stack.enter_context(closing(RankPool(1, folder / f"replay{number}"))))

        def one(number: int) -> Trajectory:
            pool = free.get()
            try:
                what = f"twin {number + 1} of {len(disturbances)}"
                args = (list(words), steps, disturbances[number])
                result = pool.run(_TARGET, *args, what=what, timeout_s=_LIMIT_S)[0]
                say(f"{what} done")
                return result
            finally:
                free.put(pool)

        with ThreadPoolExecutor(workers) as threads:
            found = list(threads.map(one, range(len(disturbances))))
    return Replayed(run, found[:twins], amplification(run, found[twins:]))


def replay(words: Sequence[str], steps: int, world_size: int, folder: Path, control: str = "") -> Trajectory:
    """Train the first steps of a run on its own engine, with its own number of processes.

    Args:
        words: overrides of the run.
        steps: to train.
        world_size: processes, on this machine.
        folder: scratch folder.
        control: name of a defect that is put in; "": none.

    Raises:
        RanksFailed, RankLost: a replay raised an exception, died or hung.
    """
    with closing(RankPool(world_size, folder / f"ranks{world_size}")) as pool:
        args = (list(words), steps, None, control)
        return pool.run(_TARGET, *args, what="replay of RUN_B", timeout_s=_LIMIT_S)[0]
