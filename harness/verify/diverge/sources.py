"""What is on disk of a run, as a `Trajectory`: rows and checkpoints of a run folder, or a table of another trainer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.config import compose
from harness.config.identity import differing_keys
from harness.errors import InputError
from harness.files.bounded import UnreadableFile
from harness.record import readers
from harness.record.tables import parse_value, read_rows
from harness.verify.diverge.trajectory import Trajectory, sketch, unit

if TYPE_CHECKING:
    from harness.config.schema import RunConfig

TABLES = (".csv", ".jsonl")


@dataclass(frozen=True)
class Recorded:
    """A run as it was recorded.

    Attributes:
        path: of the folder or table.
        config: None for a table.
        identity: hash of what changes the result; None: unknown.
        trajectory: of its first steps.
    """

    path: Path
    config: RunConfig | None
    identity: str | None
    trajectory: Trajectory


def folder(key: str, path: Path, steps: int) -> Recorded:
    """Read a run folder.

    Args:
        key: name of the argument, for errors.
        path: of the folder.
        steps: last step that is read.

    Raises:
        InputError: no run folder, or it has no row or checkpoint of these steps.
    """
    if not (path / readers.CONFIG).is_file():
        reason = "is no run folder: it has no config.yaml" if path.is_dir() else "does not exist"
        raise InputError(
            key, str(path), reason, allowed="a run folder, such as runs/GROUP/NAME", fix="ls runs/*"
        )
    config = compose.load_file(path / readers.CONFIG)
    status, _ = readers.status(path)
    rows, _ = readers.metrics(path / readers.METRICS)
    trajectory = _of_rows([dict(row) for row in rows], steps)
    _add_checkpoints(path, steps, trajectory)
    if not trajectory.losses and not trajectory.sketches:
        raise InputError(
            key, str(path), f"has no row and no checkpoint of its first {steps} steps", fix="--steps 50"
        )
    return Recorded(path, config, status.identity if status else None, trajectory)


def table(key: str, path: Path, steps: int, optimizer: str, seed: int) -> Recorded:
    """Read the run of an optimizer and a seed from a table of another trainer; any run, if the table has only one.

    Args:
        key: name of the argument, for errors.
        path: a .csv or .jsonl file in the format of docs/report.md.
        steps: last step that is read.
        optimizer, seed: of the run to compare with.

    Raises:
        InputError: the table cannot be read, has no losses, or does not say which of its runs is meant.
    """
    complaints: list[str] = []
    try:
        rows = [row for _, row in read_rows(path, complaints)]
    except (FileNotFoundError, UnreadableFile) as error:
        raise InputError(key, str(path), f"cannot be read: {error}", fix="give a CSV or JSONL file") from None
    runs: dict[tuple[str, Any], list[dict[str, Any]]] = {}
    for row in rows:
        name = (str(row.get("optimizer") or optimizer), parse_value(row.get("seed") or seed))
        runs.setdefault(name, []).append(row)
    chosen = runs.get((optimizer, seed)) or (next(iter(runs.values())) if len(runs) == 1 else None)
    if chosen is None:
        names = [f"{name} seed {number}" for name, number in runs]
        reason = f"has no run of {optimizer}, seed {seed}" if runs else "has no rows"
        raise InputError(key, str(path), reason, allowed=names, fix="keep the rows of one run")
    trajectory = _of_rows(chosen, steps)
    if not trajectory.losses:
        why = f" ({complaints[0]})" if complaints else ""
        raise InputError(
            key,
            str(path),
            f"has no train/loss at a step up to {steps}{why}",
            allowed="columns step and train/loss",
            fix="--steps 50",
        )
    trajectory.units = {
        "loss": unit(trajectory.losses.values()),
        "gradient norm": unit(trajectory.gradient_norms.values()),
    }
    return Recorded(path, None, None, trajectory)


def refuse_other_runs(a: Recorded, b: Recorded) -> None:
    """Refuse to compare runs that were asked to compute different things.

    Raises:
        InputError: naming the keys in which they differ.
    """
    if a.identity is None or b.identity is None or a.identity == b.identity:
        return
    assert a.config is not None
    assert b.config is not None
    keys = differing_keys(a.config, b.config)
    what = ", ".join(keys) if keys else "the corpus"
    raise InputError(
        "diverge",
        str(b.path),
        f"is another experiment than {a.path}: {what} differs, so the runs differ by more than rounding",
        fix=f"optbench diverge {a.path} {b.path} --force",
    )


def _of_rows(rows: list[dict[str, Any]], steps: int) -> Trajectory:
    found = Trajectory()
    for row in rows:
        step = _number(row.get("step"))
        if not (math.isfinite(step) and step == int(step) and 1 <= step <= steps):
            continue
        for key, values in (("train/loss", found.losses), ("grad_norm", found.gradient_norms)):
            # JSON has no number for a loss that was not finite: a null is one.
            if key in row and row[key] != "":
                values[int(step)] = _number(row[key])
    return found


def _number(cell: Any) -> float:
    value = parse_value(cell)
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan


def _add_checkpoints(path: Path, steps: int, trajectory: Trajectory) -> None:
    """Add sketches of the weights of every whole checkpoint up to a step."""
    from harness.checkpoint import store
    from harness.checkpoint.contents import WEIGHT
    from harness.checkpoint.files import Saved

    checkpoints = store.Store(path)
    for step in checkpoints.steps():
        if not 1 <= step <= steps:
            continue
        try:
            store.verify(checkpoints.folder(step))
            saved = Saved(checkpoints.folder(step))
        except store.DamagedCheckpoint:
            continue
        weights: Mapping[str, Any] = {name: saved.whole(name, WEIGHT) for name in saved.names(WEIGHT)}
        trajectory.sketches[step] = {name: sketch(name, weight) for name, weight in weights.items()}
        saved.close()
