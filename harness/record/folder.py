"""The run folder on disk: who may use it, and how its files are written. Torch-free; `schema.py` says what is in it."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

import filelock
from omegaconf import OmegaConf

from harness.config import compose, value_formats
from harness.config.identity import differing_keys
from harness.config.identity import identity as identity_of
from harness.config.schema import RunConfig
from harness.errors import InputError
from harness.files import atomic, locks
from harness.protocols import MetricRow
from harness.record import readers
from harness.record.schema import METRICS, SCHEMA_VERSION
from harness.redaction import redact_text
from harness.schedule import ShorterRun

EXTENDED = "extended_from"
"""Key of status.json: the shorter runs that the folder held, {identity, steps, val/loss, wandb_run_id, when} each."""

REQUEUE = "REQUEUE"
"""Name of the mark in the folder of a run that was stopped with a checkpoint."""

JOBS = "slurm"
"""Name of the folder of batch scripts and their output, in a run's folder or a group's. It is there before the run."""

DONE = "DONE"
"""Name of the mark of a finished run."""

SUPERSEDED = "metrics.superseded.jsonl"
"""Rows of steps that a later attempt did again: before each group a line {"attempt", "goes_on_after", "rows"}."""


def path_of(config: RunConfig, identity: str) -> Path:
    """Return ``runs_dir/group/name``; the default name tells model, optimizer, seed and identity apart.

    Raises:
        InputError: the name is not a folder name, or the path is too long.
    """
    name = config.name or f"{config.model.name}-{config.optimizer.name}-seed{config.seed}-{identity[:6]}"
    value_formats.check_folder_name("name", name)
    folder = Path(config.runs_dir) / config.group / name
    value_formats.check_run_folder(folder, Path(config.runs_dir) / config.group)
    return folder


def lock_file(folder: Path) -> Path:
    """Return the file whose lock the process that writes a run folder holds; next to it, as the folder may move."""
    return folder.with_name(f".{folder.name}.lock")


def check(folder: Path, config: RunConfig, identity: str, shorter_runs: Sequence[ShorterRun] = ()) -> None:
    """Refuse a folder that this run must not write to, before anything is spent.

    Args:
        folder: of the run.
        config: of the run.
        identity: of the run.
        shorter_runs: those that it continues, which may be finished.

    Raises:
        InputError: the folder cannot be written, or holds a finished run, a run of another identity, or files
            that are no run; unless ``overwrite=true``, which moves the old folder aside.
    """
    _check_writable(folder)
    if not folder.exists() or _is_empty(folder) or config.overwrite:
        return
    # The identity says what would be trained, whatever the folder is called.
    theirs = _identity(folder, config)
    if theirs in {run.identity for run in shorter_runs}:
        return
    if theirs != identity:
        raise InputError(
            "name",
            folder,
            f"belongs to run {theirs}, this is run {identity}: {_differences(folder, config)}",
            fix="another name=, or overwrite=true (moves the old run aside)",
        )
    if (folder / DONE).exists():
        raise InputError(
            "name",
            folder,
            "is a finished run with these settings",
            fix="overwrite=true (moves the old run aside)",
        )


def _check_writable(folder: Path) -> None:
    """Refuse a place where no file can be made, such as a folder of another user or a read-only disk."""
    existing = next((place for place in (folder, *folder.parents) if place.exists()), Path())
    if not existing.is_dir():
        raise _unwritable(folder, f"{existing} is a file")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise _unwritable(folder, f"{existing} is read-only for you")


def _unwritable(folder: Path, reason: str) -> InputError:
    return InputError(
        "runs_dir", folder, f"cannot be written ({reason})", fix="runs_dir=FOLDER that you may write to"
    )


def _identity(folder: Path, config: RunConfig) -> str:
    """Return the identity of the run in a folder, from other files where status.json is damaged.

    Raises:
        InputError: the folder holds no run, or none with a readable identity.
    """
    status, problems = readers.status(folder)
    if status is not None and status.identity is not None:
        return status.identity
    if status is None and not problems:
        raise InputError("name", folder, "holds files, but no run", fix="name=… or group=… of your own")
    summary, _ = readers.summary(folder)
    if summary is not None and summary.identity is not None:
        return summary.identity
    environment, _ = readers.environment(folder)
    facts = {} if environment is None else environment.facts()
    hashes = [facts.get(f"{name}_sha256") for name in ("corpus", "tokenizer")]
    with contextlib.suppress(OSError, InputError):
        if all(isinstance(value, str) for value in hashes):
            return identity_of(compose.load_file(folder / "config.yaml"), *map(str, hashes))
    raise InputError(
        "name",
        folder,
        f"holds a run without a readable identity ({(problems or ['status.json has no identity'])[0]})",
        fix="another name=, or overwrite=true (moves the old run aside)",
    )


class RunFolder:
    """The folder of a run that is being written, by rank 0 alone.

    Opening it takes a lock that the operating system frees when the process dies, so that two runs never
    write to one folder. An unfinished run of the same identity continues as a new attempt, which `begin` opens:
    metrics.jsonl then holds the rows up to the step it continues from, and the rows behind it move to the end of
    `SUPERSEDED`, after a line that says which attempt took their place.

    Attributes:
        path: of the folder.
        problems: what of its files could not be read, a line each.
    """

    def __init__(
        self, path: Path, config: RunConfig, identity: str, shorter_runs: Sequence[ShorterRun] = ()
    ) -> None:
        """Open the folder.

        Raises:
            InputError: `check` refuses the folder, or another process is writing to it.
        """
        self.path = path
        try:
            path.mkdir(parents=True, exist_ok=True)
            # Held by the operating system: it is free as soon as this process dies.
            self._lock = locks.acquire(lock_file(path), key="runs_dir", timeout=0)
        except filelock.Timeout as error:
            raise InputError(
                "name", path, "is being written to by another run", fix="another name="
            ) from error
        except OSError as error:
            raise _unwritable(path, error.strerror or str(error)) from error
        check(path, config, identity, shorter_runs)
        self._archive_replaced(config)
        status, self.problems = readers.status(path)
        previous = {} if status is None else status.facts()
        recorded = previous.get(EXTENDED)
        previous[EXTENDED] = (
            [run for run in recorded if isinstance(run, dict)] if isinstance(recorded, list) else []
        )
        if previous.get("identity") in {run.identity for run in shorter_runs}:
            self._extend(previous)
        self._status: dict[str, Any] = {
            "schema_version": SCHEMA_VERSION,
            "identity": identity,
            "wandb_run_id": previous.get("wandb_run_id"),
            "steps": config.steps,
            "attempts": previous.get("attempts", []),
        }
        if previous[EXTENDED]:
            self._status[EXTENDED] = previous[EXTENDED]
        self._status["attempts"].append({"started": now(), "world_size": config.world_size, "first_step": 0})
        # The mark of the attempt before: this one has not been stopped yet.
        (path / REQUEUE).unlink(missing_ok=True)
        self._metrics: IO[str] | None = None
        self._log = (path / "log.txt").open("a", encoding="utf-8")
        (path / DONE).unlink(missing_ok=True)  # of a run of fewer steps
        # At once: whoever finds this process dead must not take the last attempt's end for this one's.
        self.set_state("running", step=0)
        atomic.write_text(path / "config.yaml", compose.to_yaml(config))
        atomic.write_text(
            path / "config.diff.yaml", OmegaConf.to_yaml(OmegaConf.create(compose.difference(config)))
        )

    def _extend(self, previous: dict[str, Any]) -> None:
        """Note the shorter run in what becomes the new status.json, and keep its configuration and summary."""
        summary, _ = readers.summary(self.path)
        entry = {
            "identity": previous["identity"],
            "steps": previous["steps"],
            "val/loss": None if summary is None else summary.val_loss,
            "wandb_run_id": previous.get("wandb_run_id"),
            "when": now(),
        }
        for name in ("config.yaml", "summary.json"):
            source = self.path / name
            if source.exists():
                # Their names tell the steps, so that a run may be extended several times.
                source.replace(source.with_name(f"{source.stem}.steps{entry['steps']}{source.suffix}"))
        previous[EXTENDED] = [*previous[EXTENDED], entry]
        previous["wandb_run_id"] = None  # another identity is another W&B run, which gets all rows

    @property
    def attempt(self) -> int:
        """Return the number of this attempt, from 1."""
        return len(self._status["attempts"])

    @property
    def resumed_from(self) -> list[int]:
        """Return the steps after which attempts continued; 0 for those that started anew."""
        return [int(attempt.get("first_step", 0)) for attempt in self._status["attempts"]][1:]

    @property
    def extended_from(self) -> list[dict[str, Any]]:
        """Return the shorter runs that this one continues, as status.json has them."""
        return self._status.get(EXTENDED, [])

    def begin(self, first_step: int) -> list[MetricRow]:
        """Open this attempt, which continues after ``first_step`` steps; return the rows up to there.

        Lines that cannot be read are left out and kept in ``metrics.damaged.jsonl``; `problems` tells how many.
        """
        metrics = self.path / readers.METRICS
        rows, problems = readers.metrics(metrics)
        if not _is_only_torn(metrics, problems):
            self.problems += problems
        # Rows behind the checkpoint will be written again by this attempt.
        kept = [row for row in rows if (row["step"] or 0) <= first_step]
        superseded = [row for row in rows if (row["step"] or 0) > first_step]
        if problems and not _is_only_torn(metrics, problems):
            damaged = self.path / "metrics.damaged.jsonl"
            if metrics.is_file():
                shutil.copyfile(metrics, damaged)
            else:
                metrics.replace(damaged)  # a pipe or a folder, which nobody may open
        if superseded:
            self._keep_superseded(superseded, first_step)
        if superseded or problems:
            atomic.write_text(metrics, "".join(json.dumps(row) + "\n" for row in kept))
        self._metrics = metrics.open("a", encoding="utf-8")
        self._status["attempts"][-1]["first_step"] = first_step
        self.set_state("running", step=first_step)
        return kept

    def _keep_superseded(self, rows: Sequence[MetricRow], first_step: int) -> None:
        # A line of its own tells which attempt replaced the rows after it.
        marker = {"attempt": self.attempt, "goes_on_after": first_step, "rows": len(rows)}
        with (self.path / SUPERSEDED).open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(line) + "\n" for line in (marker, *rows))
            file.flush()
            os.fsync(file.fileno())

    def ask_to_be_requeued(self, step: int) -> None:
        """Leave the mark of a run that was stopped and can be resumed; exit codes do not pass every launcher."""
        atomic.write_text(self.path / REQUEUE, f"{step}\n")

    @property
    def wandb_run_id(self) -> str | None:
        """Return the id of the W&B run that mirrors this folder, over all attempts."""
        return self._status["wandb_run_id"]

    @wandb_run_id.setter
    def wandb_run_id(self, run_id: str) -> None:
        self._status["wandb_run_id"] = run_id

    def set_state(self, state: str, *, step: int, reason: str = "") -> None:
        """Write status.json: the state of the run and of this attempt."""
        self._status |= {"state": state, "step": step, "updated": now()}
        self._status["attempts"][-1] |= {"ended": now(), "state": state, "reason": reason, "last_step": step}
        # A running run writes it at every row: that it runs need not outlive a power failure.
        atomic.write_json(self.path / "status.json", self._status, sync_name=state != "running")

    def add_row(self, row: Mapping[str, float | int | None]) -> None:
        """Append a row of metrics.jsonl and flush it; values that are not finite become null."""
        # The table is the format's documentation: a key that is missing there is a bug.
        unknown = row.keys() - METRICS.keys()
        assert not unknown, f"keys missing from the table of metrics: {unknown}"
        assert self._metrics is not None, "the attempt has not begun"
        self._metrics.write(json.dumps({key: finite(value) for key, value in row.items()}) + "\n")
        self._metrics.flush()

    def add_log(self, text: str) -> None:
        """Append ``text`` to log.txt, without secrets."""
        self._log.write(redact_text(text).rstrip("\n") + "\n")
        self._log.flush()

    def write_json(self, name: str, data: Mapping[str, Any] | list[Any]) -> None:
        """Write one of the folder's JSON files, whole."""
        atomic.write_json(self.path / name, data)

    def sync_rows(self) -> None:
        """Put all rows on the disk: a disk without room may only say so now.

        Raises:
            OSError: the disk refuses.
        """
        if self._metrics is not None:
            self._metrics.flush()
            os.fsync(self._metrics.fileno())

    def end(self, state: str, *, step: int, reason: str) -> None:
        """Write how this attempt ended and release the folder; a finished run gets its mark first."""
        if state == "finished":
            atomic.write_text(self.path / DONE, "")
        try:
            self.set_state(state, step=step, reason=reason)
        except BaseException:
            # No mark without the state: whoever reads the one believes the other.
            (self.path / DONE).unlink(missing_ok=True)
            raise
        finally:
            self.close()

    def close(self) -> None:
        """Close the files and release the lock."""
        if self._metrics is not None:
            self._metrics.close()
        self._log.close()
        self._lock.release()

    def _archive_replaced(self, config: RunConfig) -> None:
        if config.overwrite and not _is_empty(self.path):
            _move_aside(self.path)
            self.path.mkdir()


def archive(path: Path) -> None:
    """Move a run folder to a hidden name next to it.

    Raises:
        InputError: another process is writing to it.
    """
    try:
        lock = locks.acquire(lock_file(path), key="runs_dir", timeout=0)
    except filelock.Timeout as error:
        raise InputError("name", path, "is being written to by another run", fix="another name=") from error
    try:
        _move_aside(path)
    finally:
        lock.release()


def _move_aside(path: Path) -> None:
    stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S-%f")
    path.rename(path.with_name(f".{path.name}.replaced-{stamp}"))


def finite(value: float | int | None) -> float | int | None:
    """Return ``value``, or None where it is NaN or infinite."""
    return value if value is None or math.isfinite(value) else None


def now() -> str:
    """Return the UTC time in ISO 8601, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _is_only_torn(metrics: Path, problems: Sequence[str]) -> bool:
    """Return True if the only problem is a torn last line, as a run leaves it that is killed while writing."""
    if len(problems) != 1 or not problems[0].startswith("the last line "):
        return not problems
    return metrics.is_file()


def _is_empty(folder: Path) -> bool:
    return all(entry.name == JOBS for entry in folder.iterdir())


def _differences(folder: Path, config: RunConfig) -> str:
    keys: Iterable[str]
    try:
        keys = differing_keys(compose.load_file(folder / "config.yaml"), config)
    except (OSError, InputError):
        keys = ()
    shown = [key for key in keys if not key.startswith(("name", "group", "runs_dir"))][:5]
    return "they differ in " + ", ".join(shown) if shown else "their data or settings differ"
