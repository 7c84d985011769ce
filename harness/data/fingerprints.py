"""SHA-256 of files; those of large files are remembered, so that 10 GB are not read at every start."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from harness.files import atomic

# Below this size hashing costs less than 50 ms, and nothing is taken on trust.
ALWAYS_HASHED_BYTES = 64 * 2**20


class Fingerprints:
    """SHA-256 of files.

    Files above ``ALWAYS_HASHED_BYTES`` are hashed once for each (path, size, mtime, ctime, inode): ctime
    cannot be set back by a user, so an edited file is always read again.

    Args:
        folder: where the hashes of large files are remembered; nothing is remembered if it cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def sha256(self, path: Path) -> str:
        """SHA-256 of the bytes of ``path``, hexadecimal. Raises OSError if it cannot be read."""
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
        """(name, SHA-256) of each file; the name is relative to ``base`` if given, else bare."""
        return [(str(p.relative_to(base)) if base else p.name, self.sha256(p)) for p in paths]


def file_sha256(path: Path) -> str:
    """SHA-256 of the bytes of ``path``, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
