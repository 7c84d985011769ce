"""The run folder on disk: who may use it, and how its files are written. Torch-free; `schema.py` says what is in it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

import filelock
from omegaconf import OmegaConf

from harness.config import compose
from harness.config.errors import InputError
from harness.config.identity import differing_keys
from harness.config.schema import RunConfig
from harness.record import atomic
from harness.record.redaction import redact_text
from harness.record.schema import METRICS, SCHEMA_VERSION

REQUEUE = "REQUEUE"
"""Name of the mark in the folder of a run that was stopped with a checkpoint."""

JOBS = "slurm"
"""Name of the folder of batch scripts and their output, in a run's folder or a group's. It is there before the run."""

Row = dict[str, float | int | None]


def path_of(config: RunConfig, identity: str) -> Path:
    """``runs_dir/group/name``; the default name tells model, optimizer, seed and identity apart."""
    name = config.name or f"{config.model.name}-{config.optimizer.name}-seed{config.seed}-{identity[:6]}"
    return Path(config.runs_dir) / config.group / name


def check(folder: Path, config: RunConfig, identity: str) -> None:
    """Refuse a folder that this run must not write to, before anything is spent.

    Raises:
        InputError: the folder holds a finished run, a run of another identity, or files that are no run;
            unless ``overwrite=true``, which moves the old folder aside.
    """
    if not folder.exists() or _is_empty(folder) or config.overwrite:
        return
    old = _status(folder)
    if old is None:
        raise InputError(
            "name", folder, "holds files that are not a run", fix="name=… or group=… of your own"
        )
    if old.get("identity") != identity:
        raise InputError(
            "name",
            folder,
            f"belongs to run {old.get('identity')}, this is run {identity}: {_differences(folder, config)}",
            fix="another name=, or overwrite=true (moves the old run aside)",
        )
    if (folder / "DONE").exists():
        raise InputError(
            "name",
            folder,
            "is a finished run with these settings",
            fix="overwrite=true (moves the old run aside)",
        )


class RunFolder:
    """The folder of a run that is being written, by rank 0 alone.

    Opening it takes a lock that the operating system frees when the process dies, so that two runs never
    write to one folder. An unfinished run of the same identity is gone on with as a new attempt, which `begin` opens:
    metrics.jsonl then holds the rows up to the step it goes on from, and all rows of the attempt before stay in
    ``metrics.attempt<k>.jsonl``.
    """

    def __init__(self, path: Path, config: RunConfig, identity: str) -> None:
        """Raises InputError if `check` refuses the folder or another process is writing to it."""
        path.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._lock = filelock.FileLock(path.parent / f".{path.name}.lock", timeout=0)
        try:
            self._lock.acquire()
        except filelock.Timeout as error:
            raise InputError(
                "name", path, "is being written to by another run", fix="another name="
            ) from error
        check(path, config, identity)
        self._set_aside(config)
        previous = _status(path) or {}
        self._status: dict[str, Any] = {
            "schema_version": SCHEMA_VERSION,
            "identity": identity,
            "wandb_run_id": previous.get("wandb_run_id"),
            "steps": config.steps,
            "attempts": previous.get("attempts", []),
        }
        self._status["attempts"].append({"started": now(), "world_size": config.world_size, "first_step": 0})
        (path / REQUEUE).unlink(missing_ok=True)
        self._metrics: IO[str] | None = None
        self._log = (path / "log.txt").open("a", encoding="utf-8")
        # At once: whoever finds this process dead must not take the last attempt's end for this one's.
        self.set_state("running", step=0)
        atomic.write_text(path / "config.yaml", compose.to_yaml(config))
        atomic.write_text(
            path / "config.diff.yaml", OmegaConf.to_yaml(OmegaConf.create(compose.difference(config)))
        )

    @property
    def attempt(self) -> int:
        """Number of this attempt, from 1."""
        return len(self._status["attempts"])

    @property
    def resumed_from(self) -> list[int]:
        """Steps after which attempts went on; 0 for those that began anew."""
        return [int(attempt["first_step"]) for attempt in self._status["attempts"]][1:]

    def begin(self, first_step: int) -> list[Row]:
        """Open this attempt, which goes on after ``first_step`` steps; returns the rows up to there."""
        metrics, kept = self.path / "metrics.jsonl", []
        if metrics.exists():
            kept = [row for row in read_rows(metrics) if (row["step"] or 0) <= first_step]
            metrics.rename(self.path / f"metrics.attempt{self.attempt - 1}.jsonl")
        atomic.write_text(metrics, "".join(json.dumps(row) + "\n" for row in kept))
        self._metrics = metrics.open("a", encoding="utf-8")
        self._status["attempts"][-1]["first_step"] = first_step
        self.set_state("running", step=first_step)
        return kept

    def ask_to_be_requeued(self, step: int) -> None:
        """Leave the mark of a run that was stopped and can go on; exit codes do not pass every launcher."""
        atomic.write_text(self.path / REQUEUE, f"{step}\n")

    @property
    def wandb_run_id(self) -> str | None:
        """Id of the W&B run that mirrors this folder, over all attempts."""
        return self._status["wandb_run_id"]

    @wandb_run_id.setter
    def wandb_run_id(self, run_id: str) -> None:
        self._status["wandb_run_id"] = run_id

    def set_state(self, state: str, *, step: int, reason: str = "") -> None:
        """Write status.json: where the run is, and how this attempt stands."""
        self._status |= {"state": state, "step": step, "updated": now()}
        self._status["attempts"][-1] |= {"ended": now(), "state": state, "reason": reason, "last_step": step}
        atomic.write_json(self.path / "status.json", self._status)

    def add_row(self, row: Mapping[str, float | int | None]) -> None:
        """Append a row of metrics.jsonl and flush it; values that are not finite become null."""
        unknown = row.keys() - METRICS.keys()
        assert not unknown, f"keys missing from the table of metrics: {unknown}"
        assert self._metrics is not None, "the attempt has not begun"
        self._metrics.write(json.dumps({key: finite(value) for key, value in row.items()}) + "\n")
        self._metrics.flush()

    def add_log(self, text: str) -> None:
        """Append to log.txt."""
        self._log.write(redact_text(text).rstrip("\n") + "\n")
        self._log.flush()

    def write_json(self, name: str, data: Mapping[str, Any] | list[Any]) -> None:
        """Write one of the folder's JSON files, whole."""
        atomic.write_json(self.path / name, data)

    def close(self, *, done: bool) -> None:
        """Give the folder free; ``done`` leaves the mark of a finished run."""
        if done:
            (self.path / "DONE").touch()
        if self._metrics is not None:
            self._metrics.close()
        self._log.close()
        self._lock.release()

    def _set_aside(self, config: RunConfig) -> None:
        if config.overwrite and not _is_empty(self.path):
            set_aside(self.path)
            self.path.mkdir()


def set_aside(path: Path) -> None:
    """Move a run folder to a hidden name beside it."""
    stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S-%f")
    path.rename(path.with_name(f".{path.name}.replaced-{stamp}"))


def finite(value: float | int | None) -> float | int | None:
    """``value``, or None where it is NaN or infinite."""
    return value if value is None or math.isfinite(value) else None


def now() -> str:
    """UTC time, ISO 8601, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def read_rows(path: Path) -> list[Row]:
    """The complete rows of a metrics.jsonl; a torn last line (the run was killed) is left out."""
    rows: list[Row] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def _is_empty(folder: Path) -> bool:
    return all(entry.name == JOBS for entry in folder.iterdir())


def _status(folder: Path) -> dict[str, Any] | None:
    try:
        return json.loads((folder / "status.json").read_text())
    except (OSError, json.JSONDecodeError):
        return None


def _differences(folder: Path, config: RunConfig) -> str:
    keys: Iterable[str]
    try:
        keys = differing_keys(compose.load_file(folder / "config.yaml"), config)
    except (OSError, InputError):
        keys = ()
    shown = [key for key in keys if not key.startswith(("name", "group", "runs_dir"))][:5]
    return "they differ in " + ", ".join(shown) if shown else "their data or settings differ"
