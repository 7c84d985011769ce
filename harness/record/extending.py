"""Going on with a run beyond the steps that it was asked for: the same folder, a new identity. Torch-free.

A schedule that leaves the past as it was (constant, and wsd before its decay) lets a longer run share its first steps
with a shorter one. What is a share of the run then means what it meant there: warm-up, and tokens of an evaluation.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness import schedule
from harness.config import evaluation_budget
from harness.config.errors import InputError
from harness.config.schema import RunConfig
from harness.record import readers

EXTENDED = "extended_from"
"""Key of status.json: the shorter runs that the folder held, {identity, steps, val/loss, wandb_run_id, when} each."""


@dataclass(frozen=True)
class ShorterRun:
    """A run that a longer one goes on from.

    Attributes:
        identity: of the shorter run.
        steps: that it was asked for.
        shared_steps: first steps that both runs do alike: its checkpoints up to there are the longer run's, too.
    """

    identity: str
    steps: int
    shared_steps: int


def plan(
    folder: Path, config: RunConfig, identity_of: Callable[[RunConfig], str]
) -> tuple[RunConfig, tuple[ShorterRun, ...]]:
    """Return the configuration to train with, and the shorter runs that it goes on from (none: it is a run of its own).

    Args:
        folder: of the run; read only.
        config: checked, with ``steps`` as they are wanted now.
        identity_of: identity of a configuration on the same corpus.

    Raises:
        InputError: the folder holds a shorter run whose schedule does not let it go on.
    """
    if config.overwrite or not config.resume:
        return config, ()
    status, _ = readers.status(folder)
    if status is None or status.identity is None or status.steps is None:
        return config, ()
    runs = [*_recorded(status), (status.identity, status.steps)]
    # The first one has what the user typed; from then on the shares are pinned.
    (first, first_steps), *later = runs
    if config.steps < status.steps or identity_of(_with_steps(config, first_steps)) != first:
        return config, ()
    pinned = _pinned(config, first_steps)
    if any(identity_of(_with_steps(pinned, steps)) != identity for identity, steps in later):
        return config, ()
    shorter = tuple(
        ShorterRun(identity, steps, _shared_steps(pinned, steps))
        for identity, steps in runs
        if steps < config.steps
    )
    if not shorter:
        return config, ()
    if config.steps > status.steps:
        _check(folder, config, shorter[-1])
    return pinned, shorter


def shorter_neighbour(
    folder: Path, config: RunConfig, identity_of: Callable[[RunConfig], str]
) -> tuple[Path, int] | None:
    """Return the longest run next to ``folder`` that a name would let go on, with its steps; None if there is none.

    Args:
        folder: of a run without a name of its own; it does not exist.
        config: of that run.
        identity_of: identity of a configuration on the same corpus.
    """
    if config.schedule.name == "cosine" or not folder.parent.is_dir():
        return None
    found = []
    for path in folder.parent.glob(f"{folder.name.rpartition('-')[0]}-*"):
        status, _ = readers.status(path)
        if status is None or not status.steps or status.steps >= config.steps:
            continue
        if status.identity == identity_of(_with_steps(config, status.steps)):
            found.append((status.steps, path))
    return max(found)[::-1] if found else None


def _recorded(status: readers.Status) -> list[tuple[str, int]]:
    entries: Any = status.facts().get(EXTENDED)
    found = []
    for entry in entries if isinstance(entries, list) else []:
        if isinstance(entry, dict):
            identity, steps = entry.get("identity"), entry.get("steps")
            if isinstance(identity, str) and isinstance(steps, int) and steps > 0:
                found.append((identity, steps))
    return found


def _with_steps(config: RunConfig, steps: int) -> RunConfig:
    return config.model_copy(update={"steps": steps})


def _pinned(config: RunConfig, steps: int) -> RunConfig:
    """Return the configuration with shares of a run of ``steps`` as the numbers that they were there."""
    warmup = schedule.length(config.schedule.warmup, steps)
    changes: dict[str, Any] = {"schedule": config.schedule.model_copy(update={"warmup": float(warmup)})}
    evaluated = evaluation_budget.tokens(_with_steps(config, steps))
    if evaluated != evaluation_budget.tokens(config):
        changes["eval"] = config.eval.model_copy(update={"tokens": evaluated})
    return config.model_copy(update=changes)


def _shared_steps(config: RunConfig, steps: int) -> int:
    """Return how many first steps have the same learning rates in a run of ``steps`` and in that of ``config``."""
    longer = schedule.factor(config.schedule, config.steps)
    shorter = schedule.factor(config.schedule, steps)
    return next((step for step in range(steps) if longer(step) != shorter(step)), steps)


def _check(folder: Path, config: RunConfig, shorter: ShorterRun) -> None:
    """Refuse what cannot go on, before anything is spent; says what would change and what to do instead."""
    instead = (
        f"optbench export {shlex.quote(str(folder))} MODEL, then optbench train model.path=MODEL name=… "
        f"(a new schedule from those weights), or overwrite=true (begins anew with all {config.steps} steps)"
    )
    if config.schedule.name == "cosine":
        before, after = (schedule.factor(config.schedule, steps) for steps in (shorter.steps, config.steps))
        last = shorter.steps - 1
        peak = config.optimizer.lr or 0.0
        raise InputError(
            "steps",
            config.steps,
            f"would change the past of the run of {shorter.steps} steps in {folder}: a cosine schedule stretches over "
            f"all steps, so step {last + 1} had lr {peak * before(last):.3g} and would have {peak * after(last):.3g}",
            allowed="more steps of a run with schedule=constant, or schedule=wsd before its decay",
            fix=instead,
        )
    steps = _saved_steps(folder)
    if not any(step <= shorter.shared_steps for step in steps):
        have = (
            f"holds checkpoints of step {', '.join(map(str, steps))} only" if steps else "holds no checkpoint"
        )
        raise InputError(
            "steps",
            config.steps,
            f"cannot go on from the run of {shorter.steps} steps in {folder}, which {have}; the learning rates are the "
            f"same up to step {shorter.shared_steps}",
            allowed=f"a run that kept a checkpoint up to step {shorter.shared_steps} (checkpoint.keep_every=…)",
            fix=instead,
        )


def _saved_steps(folder: Path) -> Sequence[int]:
    from harness.checkpoint.store import Store

    return sorted(Store(folder).steps())
