"""Cached folders: each is built once, by one process, completely or not at all.

A folder is ``<cache>/<name>-<key>/``; the key is a hash of all that decides its contents. Builders hold a file lock
(the system releases it when a process dies), write under a temporary name, flush, and rename last, so a folder under
its final name is complete. A folder that does not match its manifest is never used.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import Timeout

from harness.data.manifest import Kind, damage, read_manifest, write_manifest
from harness.data.spool import Say
from harness.errors import InputError
from harness.files import locks
from harness.files.atomic import sync_folder
from harness.files.cache import Fingerprints, file_sha256


def open_or_build(
    root: Path,
    name: str,
    parts: Mapping[str, Any],
    kind: Kind,
    build: Callable[[Path], dict[str, Any]],
    summary: Callable[[dict[str, Any]], str],
    say: Say,
) -> tuple[Path, dict[str, Any]]:
    """Return a cached folder and its manifest: opened if it is there and intact, else built.

    Safe to call from any number of processes at once: one builds, the others wait and open. A build that dies,
    however it dies, leaves nothing that would be taken for a folder; the next call cleans up after it.

    Args:
        root: the cache.
        name: start of the folder's name, for people.
        parts: all that decides the contents; JSON, hashed into the folder's name together with ``kind.format``.
        build: writes the files of ``kind`` into the empty folder that it gets, and returns the manifest without
            checksums.
        summary: one line about a manifest, said after a build.
        say: told in one line what takes long; not called where the folder is there.

    Raises:
        InputError: the cache cannot be written, or as ``build``.
    """
    fingerprints = Fingerprints(root)
    text = json.dumps({"format": kind.format, **parts}, sort_keys=True)
    key = hashlib.sha256(text.encode()).hexdigest()[:24]
    folder = root / f"{_readable(name) or kind.noun}-{key}"
    if damage(folder, kind, fingerprints) is not None:
        try:
            with _locked(folder.parent / "locks" / f"{key}.lock", kind, say):
                problem = damage(folder, kind, fingerprints)
                if problem is not None:
                    if folder.exists():
                        say(f"the cached {kind.noun} {folder.name} is damaged ({problem}) and is built again")
                    say(summary(_build(folder, kind, build)))
        # Reading the source ends in errors of its own, so that this is the cache.
        except OSError as error:
            raise InputError(
                "data.cache_dir",
                root,
                f"cannot be written ({error.strerror or error})",
                allowed="a folder that can be written and has room for the text and its tokens",
                fix="data.cache_dir=FOLDER",
            ) from error
    return folder, read_manifest(folder, kind)


def _readable(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.]+", "_", name)[:40]


@contextmanager
def _locked(path: Path, kind: Kind, say: Say) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        lock = locks.acquire(path, key="data.cache_dir", timeout=0)
    except Timeout:
        say(f"waiting for another process that prepares the same {kind.noun}")
        lock = locks.acquire(path, key="data.cache_dir")
    try:
        yield
    finally:
        lock.release()


def _build(folder: Path, kind: Kind, build: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    root = folder.parent
    _remove_abandoned(root, key=folder.name.rpartition("-")[2])
    temporary = root / f".building-{folder.name}-{os.getpid()}"
    temporary.mkdir()
    try:
        manifest = build(temporary)
        manifest["files"] = {
            name: {"bytes": (temporary / name).stat().st_size, "sha256": file_sha256(temporary / name)}
            for name in kind.files
        }
        write_manifest(temporary, kind, manifest)
        sync_folder(temporary)
        if folder.exists():
            folder.rename(root / f".building-{folder.name}-{os.getpid()}-damaged")
        temporary.rename(folder)
        sync_folder(root)
    finally:
        for left in root.glob(f".building-{folder.name}-*"):
            _remove(left)
    return manifest


def _remove_abandoned(root: Path, key: str) -> None:
    """Remove what builds left that died, of this folder and of others, whose text may fill a disk.

    Args:
        key: of the folder whose lock this process holds; a lock that can be taken has no living builder.
    """
    for path in root.glob(".building-*"):
        match = re.fullmatch(r"\.building-.*-([0-9a-f]{24})-\d+(-damaged)?", path.name)
        if match is None:
            continue
        if match[1] == key:
            _remove(path)
            continue
        try:
            lock = locks.acquire(root / "locks" / f"{match[1]}.lock", key="data.cache_dir", timeout=0)
        except (Timeout, OSError):
            continue
        _remove(path)
        lock.release()


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
