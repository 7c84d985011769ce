"""The folder of a run's checkpoints: whole ones alone have a name that counts. Torch-free.

checkpoints/
    step_00001000/            whole: manifest.json, config.yaml, rank_00000.safetensors …
    .step_00002000.….partial  being written, or left behind by a process that died; never read
    latest                    name of the newest one, for people and scripts
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.record import atomic
from harness.record.atomic import sync_folder

MANIFEST = "manifest.json"
CHECKSUM = "manifest.sha256"
SCHEMA_VERSION = 1
_PREFIX = "step_"


class DamagedCheckpoint(Exception):
    """A checkpoint that must not be used; the message says which file and why."""


@dataclass(frozen=True)
class Retention:
    """Which checkpoints stay.

    Attributes:
        last: how many of the newest.
        best: also the one with the lowest validation loss.
        every: also those whose step it divides; None: no more.
    """

    last: int
    best: bool = False
    every: int | None = None

    def kept(self, losses: Mapping[int, float | None]) -> set[int]:
        """Steps to keep among checkpoints, given as step → validation loss at that step, where it was taken."""
        steps = sorted(losses)
        kept = set(steps[-self.last :])
        known = {step: loss for step, loss in losses.items() if loss is not None}
        if self.best and known:
            kept.add(min(known, key=lambda step: (known[step], step)))
        if self.every is not None:
            kept |= {step for step in steps if step % self.every == 0}
        return kept


class Store:
    """Checkpoints of one run folder. Reading is for everybody; `discard_partial`, `commit` and `prune` for rank 0."""

    def __init__(self, run_folder: Path) -> None:
        self.path = run_folder / "checkpoints"

    def steps(self) -> list[int]:
        """Steps that have a checkpoint, newest first; whether it is valid, `verify` tells."""
        names = [path.name for path in self.path.glob(f"{_PREFIX}*") if path.is_dir()]
        numbers = [name.removeprefix(_PREFIX) for name in names]
        return sorted((int(number) for number in numbers if number.isdecimal()), reverse=True)

    def folder(self, step: int) -> Path:
        """Where the checkpoint after ``step`` steps lies."""
        return self.path / f"{_PREFIX}{step:08d}"

    def partial(self, step: int, try_: str) -> Path:
        """Where it is written to. ``try_`` tells this attempt to write it from earlier ones."""
        return self.path / f".{_PREFIX}{step:08d}.{try_}.partial"

    def discard_partial(self) -> None:
        """Remove what was never finished, or was being removed."""
        for path in [*self.path.glob(f".{_PREFIX}*.partial"), *self.path.glob(f".{_PREFIX}*.old")]:
            shutil.rmtree(path, ignore_errors=True)

    def commit(self, step: int, partial: Path, manifest: Mapping[str, Any]) -> None:
        """Give a checkpoint its name, once all of its files are there and on the disk.

        Raises:
            DamagedCheckpoint: a file is missing.
            OSError: the disk refuses.
        """
        files = {}
        for rank in range(manifest["world_size"]):
            note = partial / digest_name(rank)
            if not note.exists():
                raise DamagedCheckpoint(
                    f"the file of rank {rank} is not in {partial.name}: "
                    "checkpoints need a runs_dir that all nodes share"
                )
            files[rank_name(rank)] = json.loads(note.read_text())
        for path in sorted(partial.iterdir()):
            if path.suffix == ".yaml":
                files[path.name] = digest(path)
        atomic.write_json(partial / MANIFEST, {"schema_version": SCHEMA_VERSION, **manifest, "files": files})
        atomic.write_text(partial / CHECKSUM, digest(partial / MANIFEST)["sha256"] + "\n")
        for rank in range(manifest["world_size"]):
            (partial / digest_name(rank)).unlink()
        sync_folder(partial)
        folder = self.folder(step)
        if folder.exists():
            self._remove(folder)  # a damaged one, which the run had gone back behind
        os.replace(partial, folder)
        sync_folder(self.path)

    def point_to(self, step: int) -> None:
        """Write the name of the newest checkpoint into ``latest``."""
        atomic.write_text(self.path / "latest", self.folder(step).name + "\n")

    def prune(self, retention: Retention) -> list[int]:
        """Remove what need not stay; returns the removed steps."""
        losses = {step: self._val_loss(step) for step in self.steps()}
        removed = sorted(losses.keys() - retention.kept(losses))
        for step in removed:
            self._remove(self.folder(step))
        return removed

    def set_aside(self, attempt: int) -> None:
        """Keep the checkpoints of an attempt that is not gone on with, where they are not taken for this one's."""
        if self.steps():
            self.path.rename(self.path.with_name(f"checkpoints.attempt{attempt}"))

    def free_bytes(self) -> int:
        """Space for this user on the disk."""
        self.path.mkdir(parents=True, exist_ok=True)
        return shutil.disk_usage(self.path).free

    def _val_loss(self, step: int) -> float | None:
        try:
            return read_manifest(self.folder(step)).get("val_loss")
        except DamagedCheckpoint:
            return None

    def _remove(self, folder: Path) -> None:
        # Renamed first: what is half removed must not look whole.
        doomed = folder.with_name(f".{folder.name}.old")
        shutil.rmtree(doomed, ignore_errors=True)
        os.replace(folder, doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def rank_name(rank: int) -> str:
    """File of one process."""
    return f"rank_{rank:05d}.safetensors"


def digest_name(rank: int) -> str:
    """Where a process notes size and hash of its file until the manifest takes them over."""
    return f"rank_{rank:05d}.digest.json"


def digest(path: Path) -> dict[str, Any]:
    """Size in bytes and SHA-256 of a file."""
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def read_manifest(folder: Path) -> dict[str, Any]:
    """manifest.json of a checkpoint.

    Raises:
        DamagedCheckpoint: it is missing, is not JSON, or was written by another version.
    """
    path = folder / MANIFEST
    try:
        content, checksum = path.read_bytes(), (folder / CHECKSUM).read_bytes()
    except OSError as error:
        name = Path(error.filename or MANIFEST).name
        raise DamagedCheckpoint(f"{folder.name}: {name} cannot be read ({error.strerror})") from error
    if checksum != hashlib.sha256(content).hexdigest().encode() + b"\n":
        raise DamagedCheckpoint(f"{folder.name}: {MANIFEST} has changed since it was written (SHA-256)")
    manifest = json.loads(content)
    if manifest.get("schema_version") != SCHEMA_VERSION:
        version = manifest.get("schema_version")
        raise DamagedCheckpoint(
            f"{folder.name}: written in format {version}, this version reads {SCHEMA_VERSION}"
        )
    return manifest


def verify(folder: Path, share: int = 0, of: int = 1) -> dict[str, Any]:
    """The manifest of a checkpoint whose files are all what they were when they were written.

    Args:
        folder: of the checkpoint.
        share, of: check every ``of``-th file beginning with this one, where several processes share the work.

    Raises:
        DamagedCheckpoint: naming the first file that is missing, short or changed.
    """
    manifest = read_manifest(folder)
    for name, expected in sorted(manifest["files"].items())[share::of]:
        path = folder / Path(name).name
        try:
            found = {"bytes": path.stat().st_size}
            if found["bytes"] == expected["bytes"]:
                found = digest(path)
        except OSError as error:
            raise DamagedCheckpoint(f"{folder.name}: {name} cannot be read ({error.strerror})") from error
        if found["bytes"] != expected["bytes"]:
            raise DamagedCheckpoint(
                f"{folder.name}: {name} has {found['bytes']} bytes, {expected['bytes']} were written"
            )
        if found != expected:
            raise DamagedCheckpoint(f"{folder.name}: {name} has changed since it was written (SHA-256)")
    return manifest
