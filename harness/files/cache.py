"""The cache folder, and SHA-256 of files that it remembers, so that 10 GB are not read at every start."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path

from harness.errors import InputError
from harness.files import atomic

# Below this size hashing costs less than 50 ms, and nothing is taken on trust.
ALWAYS_HASHED_BYTES = 64 * 2**20


def cache_root(cache_dir: str | None) -> Path:
    """Return the cache folder: ``data.cache_dir``, else the variable OPTBENCH_CACHE, else ``~/.cache/optbench``.

    Raises:
        InputError: its ``~`` names no home folder.
    """
    named = cache_dir or os.environ.get("OPTBENCH_CACHE") or "~/.cache/optbench"
    path = os.path.expanduser(named)
    if path.startswith("~"):
        # A user id without an account, as in a container; or ~name of nobody.
        raise InputError("data.cache_dir", named, "has no home folder", fix="data.cache_dir=FOLDER")
    return Path(path).absolute()


class Fingerprints:
    """SHA-256 of files.

    Files above ``ALWAYS_HASHED_BYTES`` are hashed once for each (path, size, mtime, ctime, inode): a user cannot set
    ctime back, so an edited file is always read again.

    Args:
        root: cache folder, in which the hashes of large files are remembered; if it cannot be written, none are.
    """

    def __init__(self, root: Path) -> None:
        self.folder = root / "fingerprints"

    def sha256(self, path: Path) -> str:
        """Return the SHA-256 of the bytes of ``path``, hexadecimal.

        Raises:
            OSError: the file cannot be read.
        """
        path = path.resolve()
        status = path.stat()
        if status.st_size < ALWAYS_HASHED_BYTES:
            return file_sha256(path)
        known = [str(path), status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]
        memo = self.folder / f"{hashlib.sha256(str(path).encode()).hexdigest()[:32]}.json"
        try:
            remembered = json.loads(memo.read_text())
            if remembered["file"] == known:
                return remembered["sha256"]
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            pass
        digest = file_sha256(path)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            atomic.write_text(memo, json.dumps({"file": known, "sha256": digest}))
        except OSError:
            pass
        return digest

    def of_files(self, paths: Iterable[Path], base: Path | None = None) -> list[tuple[str, str]]:
        """Return (name, SHA-256) of each file; the name is relative to ``base`` if given, else bare."""
        return [(str(p.relative_to(base)) if base else p.name, self.sha256(p)) for p in paths]


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of the bytes of ``path``, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
