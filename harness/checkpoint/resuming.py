"""Choose the checkpoint that a run continues from, and continue from it."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from harness.checkpoint import contents, store
from harness.checkpoint.files import Saved
from harness.checkpoint.store import DamagedCheckpoint, Store
from harness.config import compose
from harness.config.identity import differing_keys
from harness.errors import InputError
from harness.loop import Run, forward_backward
from harness.protocols import Probe
from harness.schedule import ShorterRun

_ODD = (DamagedCheckpoint, KeyError, IndexError, TypeError, ValueError, AttributeError)
"""Errors of a complete checkpoint whose contents are not those that `harness.checkpoint.contents` writes."""


class Choice(NamedTuple):
    """What rank 0 decided for all.

    Attributes:
        step: of the checkpoint to continue from; None: start at the beginning.
        attempt: number of this attempt at the run.
        rejected: what is wrong with newer checkpoints, a line each.
    """

    step: int | None
    attempt: int
    rejected: tuple[str, ...] = ()


def choose(
    run: Run, checkpoints: Store, *, identity: str, attempt: int, shorter_runs: Sequence[ShorterRun] = ()
) -> Choice:
    """Return the newest checkpoint whose files are all as they were written (a collective).

    The processes share the work of checking; rank 0's view of folder and attempt counts.

    Args:
        run: assembled.
        checkpoints: of its folder.
        identity: of the run.
        attempt: number of this attempt, as rank 0 knows it.
        shorter_runs: other runs whose checkpoints count as far as they did the same steps.

    Raises:
        InputError: a checkpoint is one of another run; says in which keys they differ.
    """
    # A network disk may show other processes an older listing.
    steps, attempt = from_first((checkpoints.steps(), attempt))
    rejected = []
    shorter = {other.identity: other for other in shorter_runs}
    for step in steps if run.config.resume else ():
        problem = ""
        try:
            manifest = store.verify(checkpoints.folder(step), run.engine.rank, run.engine.world_size)
            theirs = manifest.get("identity", "")
            if theirs != identity and theirs not in shorter:
                raise _other_run(run, checkpoints.folder(step), theirs, identity)
            # The schedules part at that step: beyond it the shorter run's weights are others.
            if theirs != identity and step > shorter[theirs].shared_steps:
                other = shorter[theirs]
                raise DamagedCheckpoint(
                    f"step {step} of the run of {other.steps} steps had other learning rates than this run "
                    f"(from step {other.shared_steps + 1} on)"
                )
            if run.engine.rank == 0:
                Saved(checkpoints.folder(step)).close()  # headers: one process is enough to see odd ones
        except DamagedCheckpoint as error:
            problem = str(error)
        # All processes take part for every step, or the collectives would not match.
        problems = [line for line in from_all(problem) if line]
        if not problems:
            return Choice(step, attempt, tuple(rejected))
        rejected.append(problems[0])
    return Choice(None, attempt, tuple(rejected))


def resume(
    run: Run, probes: Sequence[Probe], checkpoints: Store, choice: Choice, say: Callable[[str], None]
) -> int:
    """Put the run where the chosen checkpoint left it; return how many steps are done (a collective).

    The same number of processes continues bit by bit. Another number, or another engine, continues with the same
    samples and the same numbers, which are then rounded in another order.
    """
    # Said before resuming: the user must know why steps are repeated.
    for line in choice.rejected:
        say(f"checkpoint not used: {line}")
    if choice.step is None:
        if run.config.resume and choice.rejected:
            say("no checkpoint can be used: starting at step 0")
        elif run.config.resume:
            say("no checkpoint: starting at step 0")
        return 0
    run.engine.warm_up(lambda: forward_backward(run, run.loader.micro_batches(0), weight=0.0))
    folder = checkpoints.folder(choice.step)
    try:
        saved = Saved(folder)
        try:
            with torch.no_grad():
                contents.load_tensors(run, saved)
            rank, same = run.engine.rank, len(saved.facts) == run.engine.world_size
            problems = contents.restore_counters(run, probes, saved.facts, saved.own(rank) if same else None)
            before = saved.manifest
        finally:
            saved.close()
    except _ODD as error:
        # Weights may be half replaced by now, so an older checkpoint is for the next start.
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise InputError(
            "resume",
            folder,
            f"has contents that this run did not write ({reason})",
            fix=f"resume=false, or without this checkpoint: rm -r {shlex.quote(str(folder))}",
        ) from error
    for problem in problems:
        say(problem)
    line = f"resumed after step {choice.step}"
    if (before.get("engine"), before["world_size"]) != (run.engine.name, run.engine.world_size):
        line += f" (saved by {before['world_size']} process(es) under {before.get('engine')})"
    say(line)
    return choice.step


def _other_run(run: Run, folder: Path, theirs: str, ours: str) -> InputError:
    try:
        keys = differing_keys(compose.load_file(folder / "config.yaml"), run.config)
    except (OSError, InputError):
        keys = []
    what = ", ".join(keys[:5]) or "their data or tokenizer"
    return InputError(
        "resume",
        folder.name,
        f"is a checkpoint of run {theirs}, this is run {ours}; they differ in {what}",
        fix="resume=false, or another name=",
    )


def from_first(value: Any) -> Any:
    """Return rank 0's value on all processes (a collective)."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def from_all(value: str) -> list[str]:
    """Return the values of all processes, by rank (a collective)."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
