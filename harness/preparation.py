"""All that can be known before a process starts or torch is imported: configuration, data, the folder to write to.

A run may also continue a shorter one in its folder, under a new identity: where the schedule leaves the past as it was
(constant, and wsd before its decay). What is a share of the run (warm-up, tokens of an evaluation) keeps its value.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.checkpoint.store import Store
from harness.config import checks, compose, derived_defaults
from harness.config.identity import comparison_key, identity, weights_sha256
from harness.config.schema import RunConfig
from harness.errors import InputError
from harness.record import folder as run_folder
from harness.record import readers
from harness.record.folder import EXTENDED
from harness.schedule import STRETCHED, ShorterRun, factor, length, shared_steps
from harness.tasks import task_of

if TYPE_CHECKING:
    from harness.tasks.task import TaskData


@dataclass(frozen=True)
class Prepared:
    """A run that is ready to start."""

    overrides: tuple[str, ...]
    config: RunConfig
    data: TaskData
    identity: str
    comparison_key: str
    folder: Path
    shorter_runs: tuple[ShorterRun, ...] = ()
    """What the folder held before this run asked for more steps, the shortest first."""

    def hashes(self) -> dict[str, str | int]:
        """Return what a checkpoint says of its run: "identity", "comparison_key", "corpus_sha256" and "pad_id".

        One of an adapter also says "weights_sha256": the rest of its weights is in the starting point alone.
        """
        weights = None if self.config.model.adapter is None else weights_sha256(self.config)
        return {
            **({} if weights is None else {"weights_sha256": weights}),
            "identity": self.identity,
            "comparison_key": self.comparison_key,
            "corpus_sha256": self.data.sha256,
            # With which an exported classifier finds the last token of a row.
            "pad_id": self.data.pad_id,
        }


def prepare(
    overrides: Sequence[str],
    *,
    say: Callable[[str], None],
    worker: bool = False,
    writes_folder: bool = True,
    devices: int | None = None,
) -> Prepared:
    """Compose and check the configuration, tokenize the data if they are not cached, and check the run folder.

    Safe in many processes at once: the data are built by the first, the others wait for it.

    Args:
        overrides: ``key=value`` of the command line.
        say: takes messages.
        worker: this is one of the run's own processes, not the command that starts them.
        writes_folder: whether this process will write the run folder (rank 0), so that it must be free.
        devices: GPUs of each machine that the run will start on; None: it starts on this machine.

    Raises:
        InputError: anything about the input that is wrong; nothing has been written to the run folder then.
    """
    config = checks.check(compose.load(overrides), devices=devices, worker=worker)
    # Only now: a mistyped key must not wait for numpy and the tokenizers.
    task = task_of(config)
    data = task.prepare(config, say)
    if config.epochs is not None:
        config = checks.with_epochs(config, task.samples(config, data).length)
    task.check(config, data)
    config = task.resolve(config, data)

    def identity_of(config: RunConfig) -> str:
        return identity(config, data.sha256, data.tokenizer_sha256)

    folder = run_folder.path_of(config, identity_of(config))
    config, shorter_runs = plan_extension(folder, config, identity_of)
    run_identity = identity_of(config)
    is_new = config.name is None and writes_folder and not worker and not folder.exists()
    if is_new and (shorter := find_shorter_run(folder, config, identity_of)):
        path, steps = shorter
        say(f"{path} has {steps} steps of the same run: name={path.name} continues it")
    # Not the seed and the optimizer: runs that differ in these alone may be compared.
    key = comparison_key(config, data.sha256, data.tokenizer_sha256)
    if writes_folder:
        run_folder.check(folder, config, run_identity, shorter_runs)
    return Prepared(tuple(overrides), config, data, run_identity, key, folder, shorter_runs)


def plan_extension(
    folder: Path, config: RunConfig, identity_of: Callable[[RunConfig], str]
) -> tuple[RunConfig, tuple[ShorterRun, ...]]:
    """Return the configuration to train with, and the shorter runs that it continues, if any.

    Args:
        folder: of the run; read only.
        config: checked, with ``steps`` as they are wanted now.
        identity_of: identity of a configuration on the same corpus.

    Raises:
        InputError: the folder holds a shorter run whose schedule does not let it continue.
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
    # Shares of the run keep the numbers that they had in the first, shortest run.
    pinned = _pinned(config, first_steps)
    if any(identity_of(_with_steps(pinned, steps)) != identity for identity, steps in later):
        return config, ()
    shorter = tuple(
        ShorterRun(identity, steps, shared_steps(pinned.schedule, config.steps, steps))
        for identity, steps in runs
        if steps < config.steps
    )
    if not shorter:
        return config, ()
    if config.steps > status.steps:
        _check_extension(folder, config, shorter[-1])
    return pinned, shorter


def find_shorter_run(
    folder: Path, config: RunConfig, identity_of: Callable[[RunConfig], str]
) -> tuple[Path, int] | None:
    """Return the longest run next to ``folder`` that this one would continue under its name, with its steps, or None.

    Args:
        folder: of a run without a name of its own; it does not exist.
        config: of that run.
        identity_of: identity of a configuration on the same corpus.
    """
    if config.schedule.name in STRETCHED or not folder.parent.is_dir():
        return None
    shorter = []
    for path in folder.parent.glob(f"{folder.name.rpartition('-')[0]}-*"):
        status, _ = readers.status(path)
        if status is None or not status.steps or status.steps >= config.steps:
            continue
        if status.identity == identity_of(_with_steps(config, status.steps)):
            shorter.append((status.steps, path))
    return max(shorter)[::-1] if shorter else None


def _recorded(status: readers.Status) -> list[tuple[str, int]]:
    entries: Any = status.facts().get(EXTENDED)
    runs = []
    for entry in entries if isinstance(entries, list) else []:
        if isinstance(entry, dict):
            identity, steps = entry.get("identity"), entry.get("steps")
            if isinstance(identity, str) and isinstance(steps, int) and steps > 0:
                runs.append((identity, steps))
    return runs


def _with_steps(config: RunConfig, steps: int) -> RunConfig:
    return config.model_copy(update={"steps": steps})


def _pinned(config: RunConfig, steps: int) -> RunConfig:
    """Return the configuration with shares of a run of ``steps`` as the numbers that they were there."""
    warmup = length(config.schedule.warmup, steps)
    changes: dict[str, Any] = {"schedule": config.schedule.model_copy(update={"warmup": float(warmup)})}
    evaluated = derived_defaults.evaluation_tokens(_with_steps(config, steps))
    if config.task.name == "pretrain" and evaluated != derived_defaults.evaluation_tokens(config):
        changes["eval"] = config.eval.model_copy(update={"tokens": evaluated})
    return config.model_copy(update=changes)


def _check_extension(folder: Path, config: RunConfig, shorter: ShorterRun) -> None:
    """Refuse a run that cannot continue, with what would change and what to do instead."""
    instead = (
        f"optbench export {shlex.quote(str(folder))} MODEL, then optbench train model.path=MODEL name=… "
        f"(a new schedule from those weights), or overwrite=true (begins anew with all {config.steps} steps)"
    )
    if config.schedule.name in STRETCHED:
        before, after = (factor(config.schedule, steps) for steps in (shorter.steps, config.steps))
        last = shorter.steps - 1
        peak = config.optimizer.lr or 0.0
        raise InputError(
            "steps",
            config.steps,
            f"would change the past of the run of {shorter.steps} steps in {folder}: a {config.schedule.name} "
            f"schedule stretches over all steps, so step {last + 1} had lr {peak * before(last):.3g} and would have "
            f"{peak * after(last):.3g}",
            allowed="more steps of a run with schedule=constant, or schedule=wsd before its decay",
            fix=instead,
        )
    steps = sorted(Store(folder).steps())
    if not any(step <= shorter.shared_steps for step in steps):
        have = (
            f"holds checkpoints of step {', '.join(map(str, steps))} only" if steps else "holds no checkpoint"
        )
        raise InputError(
            "steps",
            config.steps,
            f"cannot continue the run of {shorter.steps} steps in {folder}, which {have}; the learning rates are the "
            f"same up to step {shorter.shared_steps}",
            allowed=f"a run that kept a checkpoint up to step {shorter.shared_steps} (checkpoint.keep_every=…)",
            fix=instead,
        )
