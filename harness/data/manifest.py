"""Manifests of cached folders, with checksums: a folder on a shared disk is read with suspicion."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from harness.files import atomic
from harness.files.cache import Fingerprints

NAME = "manifest.json"
TOKENIZER_FILES = ("tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json")
_MAX_BYTES = 64 * 2**20

Count = Annotated[int, Field(ge=0)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Strict(BaseModel):
    """Fields by which a cached folder is read; all else in its manifest is for people."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)


class CachedFile(Strict):
    """Size and checksum of a file."""

    bytes: Count
    sha256: Sha256


class Kind(NamedTuple):
    """A kind of cached folder.

    Attributes:
        noun: what it holds, as in "the cached corpus".
        format: number of its layout; a folder of another format is built again.
        files: those that it must hold, apart from the manifest.
        schema: of its manifest; has ``files: dict[str, CachedFile]``.
    """

    noun: str
    format: int
    files: tuple[str, ...]
    schema: type[Strict]


class DamagedManifest(Exception):
    """A manifest that is missing or not what was written; says what is wrong in one phrase."""


def write_manifest(folder: Path, kind: Kind, manifest: dict[str, Any]) -> None:
    """Write ``manifest`` with its format and a checksum of its own, once all files of the folder are written."""
    manifest = {**manifest, "format": kind.format}
    atomic.write_json(folder / NAME, {**manifest, "manifest_sha256": _checksum(manifest)})


def read_manifest(folder: Path, kind: Kind) -> dict[str, Any]:
    """Return the manifest of a cached folder, checked.

    Raises:
        DamagedManifest: it is missing, cannot be read, or is not what `write_manifest` wrote.
    """
    manifest = _load(folder / NAME)
    if manifest.get("format") != kind.format:
        raise DamagedManifest(f"format {str(manifest.get('format'))[:40]}")
    if manifest.get("manifest_sha256") != _checksum(manifest):
        raise DamagedManifest(f"{NAME} has another checksum")
    try:
        kind.schema.model_validate(manifest)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise DamagedManifest(f"{NAME} cannot be read: {place}: {first['msg']}") from error
    return manifest


def damage(folder: Path, kind: Kind, fingerprints: Fingerprints) -> str | None:
    """Return what is wrong with the cached ``folder`` in one phrase, or None."""
    try:
        return _files_damage(folder, read_manifest(folder, kind)["files"], kind.files, fingerprints)
    except DamagedManifest as error:
        return str(error)


def tokenizer_folders(root: Path, sha256: str) -> Iterator[Path]:
    """Yield the intact tokenizer folders of what is cached below ``root`` with this hash, in any format.

    Folders whose manifest or tokenizer is damaged are skipped, because the cache may be shared with other users.
    """
    try:
        folders = sorted(path.parent for path in root.glob(f"*/{NAME}"))
    except OSError:
        return
    for folder in folders:
        try:
            manifest = _load(folder / NAME)
            found = manifest.get("sha256") == sha256
            if found and not _files_damage(folder, manifest["files"], TOKENIZER_FILES, Fingerprints(root)):
                yield folder / "tokenizer"
        except (DamagedManifest, KeyError, TypeError):
            continue


def _load(path: Path) -> dict[str, Any]:
    try:
        # Not blocking, in case it is a pipe.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        with open(descriptor, "rb") as file:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode) or status.st_size > _MAX_BYTES:
                raise DamagedManifest(f"{NAME} is not a file of at most {_MAX_BYTES // 2**20} MiB")
            manifest = json.loads(file.read())
    except FileNotFoundError as error:
        raise DamagedManifest(f"{NAME} is missing") from error
    # JSON's parser raises RecursionError for lists in lists in lists.
    except (OSError, ValueError, RecursionError) as error:
        raise DamagedManifest(f"{NAME} cannot be read: {type(error).__name__}") from error
    if not isinstance(manifest, dict):
        raise DamagedManifest(f"{NAME} cannot be read: it is not an object")
    return manifest


def _checksum(manifest: Mapping[str, Any]) -> str:
    content = {key: value for key, value in manifest.items() if key != "manifest_sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _files_damage(
    folder: Path, recorded: Mapping[str, Any], names: tuple[str, ...], fingerprints: Fingerprints
) -> str | None:
    for name in names:
        try:
            if name not in recorded:
                return f"{name} is not listed"
            status = (folder / name).stat()
            if not stat.S_ISREG(status.st_mode):
                return f"{name} is not a file"
            if status.st_size != recorded[name]["bytes"]:
                return f"{name} has another size"
            if fingerprints.sha256(folder / name) != recorded[name]["sha256"]:
                return f"{name} has another checksum"
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"
    return None
