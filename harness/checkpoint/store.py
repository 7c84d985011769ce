"""The folder of a run's checkpoints: only complete ones bear a name that is read. Torch-free.

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
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from harness.files import atomic, bounded
from harness.files.atomic import sync_folder
from harness.files.bounded import UnreadableFile

MANIFEST = "manifest.json"
CHECKSUM = "manifest.sha256"
CONFIG = "config.yaml"
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
        pinned: also those of these steps.
    """

    last: int
    best: bool = False
    every: int | None = None
    pinned: frozenset[int] = frozenset()

    def kept(self, losses: Mapping[int, float | None]) -> set[int]:
        """Return the steps to keep.

        Args:
            losses: step → validation loss at that step; None where it was not evaluated.
        """
        steps = sorted(losses)
        # `last` counts the newest, whatever else is kept.
        kept = set(steps[-self.last :])
        evaluated = {step: loss for step, loss in losses.items() if loss is not None}
        if self.best and evaluated:
            kept.add(min(evaluated, key=lambda step: (evaluated[step], step)))
        if self.every is not None:
            kept |= {step for step in steps if step % self.every == 0}
        return kept | (self.pinned & losses.keys())


class Store:
    """Checkpoints of one run folder. Reading is for everybody; `discard_partial`, `commit` and `prune` for rank 0."""

    def __init__(self, run_folder: Path) -> None:
        self.path = run_folder / "checkpoints"

    def steps(self) -> list[int]:
        """Return the steps that have a checkpoint, newest first; whether it is valid, `verify` tells."""
        steps = []
        for path in self.path.glob(f"{_PREFIX}*"):
            number = path.name.removeprefix(_PREFIX)
            if number.isascii() and number.isdecimal() and path == self.folder(int(number)) and path.is_dir():
                steps.append(int(number))
        return sorted(steps, reverse=True)

    def folder(self, step: int) -> Path:
        """Return the folder of the checkpoint after ``step`` steps."""
        return self.path / f"{_PREFIX}{step:08d}"

    def partial(self, step: int, try_: str) -> Path:
        """Return the folder that it is written to; ``try_`` tells this attempt from earlier ones."""
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
        # The manifest comes last: without it a folder is not a checkpoint.
        content = {"schema_version": SCHEMA_VERSION, **manifest, "files": files}
        atomic.write_json(partial / MANIFEST, content, sync_name=False)
        atomic.write_text(partial / CHECKSUM, digest(partial / MANIFEST)["sha256"] + "\n", sync_name=False)
        for rank in range(manifest["world_size"]):
            (partial / digest_name(rank)).unlink()
        # Names and contents are on the disk before the folder gets a name that is read.
        sync_folder(partial)
        folder = self.folder(step)
        if folder.exists():
            self._remove(folder)  # a damaged one, before which the run had resumed
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

    def archive(self, attempt: int, *, after: int = -1) -> list[int]:
        """Move checkpoints that no attempt continues from to ``checkpoints.attempt<k>``; returns their steps.

        Left where they are, they would count among the newest ones, and new ones would be removed in their place.

        Args:
            attempt: the one that wrote them.
            after: those of later steps than this.
        """
        moved = [step for step in self.steps() if step > after]
        archive = self.path.with_name(f"{self.path.name}.attempt{attempt}")
        for step in moved:
            archive.mkdir(exist_ok=True)
            target = archive / self.folder(step).name
            # An earlier attempt of the same number may have left one of the same step.
            for number in count(1):
                if not target.exists():
                    break
                target = archive / f"{self.folder(step).name}.{number}"
            os.replace(self.folder(step), target)
        if moved:
            (self.path / "latest").unlink(missing_ok=True)
            sync_folder(self.path)
            if left := self.steps():
                self.point_to(left[0])
        return moved

    def free_bytes(self) -> int:
        """Return the free space on the disk in bytes, for this user."""
        self.path.mkdir(parents=True, exist_ok=True)
        return shutil.disk_usage(self.path).free

    def _val_loss(self, step: int) -> float | None:
        try:
            return read_manifest(self.folder(step)).get("val_loss")
        except DamagedCheckpoint:
            return None

    def _remove(self, folder: Path) -> None:
        # Renamed first: what is half removed must not look whole.
        removed = folder.with_name(f".{folder.name}.old")
        shutil.rmtree(removed, ignore_errors=True)
        os.replace(folder, removed)
        shutil.rmtree(removed, ignore_errors=True)


def rank_name(rank: int) -> str:
    """Return the name of the file of one process."""
    return f"rank_{rank:05d}.safetensors"


def digest_name(rank: int) -> str:
    """Return the name of the file that holds size and hash of a process' file until the manifest does."""
    return f"rank_{rank:05d}.digest.json"


def digest(path: Path) -> dict[str, Any]:
    """Return size in bytes and SHA-256 of a file, as the manifest lists them."""
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


class _FileFacts(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    bytes: int = Field(ge=0)
    sha256: str = Field(pattern="^[0-9a-f]{64}$")


class _Manifest(BaseModel):
    """What of manifest.json is relied upon; other keys are allowed."""

    model_config = ConfigDict(strict=True)

    schema_version: Literal[1]
    identity: str = ""
    engine: str = ""
    step: int = Field(ge=0)
    world_size: int = Field(ge=1)
    val_loss: float | None = Field(default=None, allow_inf_nan=False)
    files: dict[str, _FileFacts]


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return manifest.json of a checkpoint, which lists the file of every process.

    Raises:
        DamagedCheckpoint: it is missing, is not a manifest, or was written by another version.
    """
    try:
        content = bounded.read_bytes(folder / MANIFEST, bounded.JSON_LIMIT)
        # Its own checksum: a flipped bit in the manifest could make a damaged file look right.
        checksum = bounded.read_bytes(folder / CHECKSUM, bounded.MIB)
        if checksum != hashlib.sha256(content).hexdigest().encode() + b"\n":
            raise UnreadableFile(f"{MANIFEST} has changed since it was written (SHA-256)")
        manifest = bounded.JsonDecoder().decode(content.decode())
    except FileNotFoundError as error:
        name = Path(error.filename).name
        raise DamagedCheckpoint(f"{folder.name}: {name} cannot be read ({error.strerror})") from error
    except UnreadableFile as error:
        raise DamagedCheckpoint(f"{folder.name}: {error}") from error
    except ValueError as error:
        raise DamagedCheckpoint(f"{folder.name}: {MANIFEST} is not JSON ({error})") from error
    version = manifest.get("schema_version") if isinstance(manifest, dict) else None
    if isinstance(version, int) and version != SCHEMA_VERSION:
        raise DamagedCheckpoint(
            f"{folder.name}: written in format {version}, this version reads {SCHEMA_VERSION}"
        )
    try:
        facts = _Manifest.model_validate(manifest)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        where = ".".join(str(part)[:40] for part in first["loc"]) or "the whole"
        raise DamagedCheckpoint(
            f"{folder.name}: {MANIFEST} is not a manifest of a checkpoint ({where}: {first['msg']})"
        ) from error
    _check_names(folder, facts)
    return manifest


def _check_names(folder: Path, facts: _Manifest) -> None:
    """Refuse a manifest that lists other files than the configuration and one of each process."""
    # Before a set of that many names is made.
    if facts.world_size > len(facts.files):
        raise DamagedCheckpoint(
            f"{folder.name}: {MANIFEST} lists {len(facts.files)} files of {facts.world_size} processes"
        )
    expected = {rank_name(rank) for rank in range(facts.world_size)}
    if (folder / CONFIG).exists() or CONFIG in facts.files:
        expected.add(CONFIG)
    if missing := sorted(expected - facts.files.keys()):
        raise DamagedCheckpoint(f"{folder.name}: {MANIFEST} does not list {missing[0]}")
    if strange := sorted(facts.files.keys() - expected):
        raise DamagedCheckpoint(
            f"{folder.name}: {MANIFEST} lists {strange[0][:80]!a}, no file of a checkpoint"
        )
    number = folder.name.removeprefix(_PREFIX)
    if number != folder.name and number.isdecimal() and int(number) != facts.step:
        raise DamagedCheckpoint(f"{folder.name}: {MANIFEST} is that of step {facts.step}")


def verify(folder: Path, share: int = 0, of: int = 1) -> dict[str, Any]:
    """Return the manifest of a checkpoint whose files are all what they were when they were written.

    Args:
        folder: of the checkpoint.
        share, of: check every ``of``-th file beginning with this one, where several processes share the work.

    Raises:
        DamagedCheckpoint: naming the first file that is missing, short or changed.
    """
    manifest = read_manifest(folder)
    # Sizes first: a truncated file is found without reading it.
    for name, expected in sorted(manifest["files"].items())[share::of]:
        try:
            # A link may lead out of the folder, opening a pipe would wait for ever.
            status = (folder / name).lstat()
            if not stat.S_ISREG(status.st_mode):
                raise DamagedCheckpoint(f"{folder.name}: {name} is not a regular file")
            actual = {"bytes": status.st_size}
            if actual["bytes"] == expected["bytes"]:
                actual = digest(folder / name)
        except OSError as error:
            raise DamagedCheckpoint(f"{folder.name}: {name} cannot be read ({error.strerror})") from error
        if actual["bytes"] != expected["bytes"]:
            raise DamagedCheckpoint(
                f"{folder.name}: {name} has {actual['bytes']} bytes, {expected['bytes']} were written"
            )
        if actual != expected:
            raise DamagedCheckpoint(f"{folder.name}: {name} has changed since it was written (SHA-256)")
    return manifest
