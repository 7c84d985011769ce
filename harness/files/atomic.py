"""Write files and folders whole or not at all, readable for whom the umask lets read them."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from harness.errors import InputError

PARTIAL = ".partial"
"""Suffix of the temporary name of a folder that is being written, or that a dead process left behind."""
_NO_FOLDER_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF, errno.EACCES, errno.EISDIR)
"""Answers of file systems that cannot flush a folder (CIFS, some FUSE): their renames are as durable as they get."""
_LONGEST_KEPT = 50
"""Characters of a name that go into its temporary name: the file system's limit is for both."""


def check_folder(key: str, folder: Path, fix: str) -> None:
    """Find out whether a folder can be written before anything is spent, and leave nothing behind.

    Args:
        key: option or key that named the folder.
        folder: need not exist; then its nearest parent that does is tried.
        fix: what to type instead.

    Raises:
        InputError: the folder cannot be made or written.
    """
    try:
        place = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        with tempfile.NamedTemporaryFile(dir=place):
            pass
    except OSError as error:
        reason = f"cannot be written ({error.strerror or error})"
        raise InputError(key, folder, reason, fix=fix) from None


def write_bytes(path: Path, data: bytes, *, sync_name: bool = True) -> None:
    """Write ``data`` under a temporary name, flush it to the disk, then rename it to ``path``.

    Args:
        path: of the file; its folder exists. A new file has the mode 0666 without the umask's bits.
        data: all of its content.
        sync_name: flush the folder, too. False: after a power failure the old content may be back, whole; for what is
            written again soon, and for folders that are flushed later.
    """
    temporary = path.with_name(_temporary(path.name))
    # Not tempfile's: its mode 0600 hides the file from a group, and 0644 would ignore a umask of 0002 or 0077.
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if sync_name:
        sync_folder(path.parent)


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Give a temporary folder to write into, which becomes ``path`` where nothing is raised and is removed else.

    Args:
        path: does not exist; folders above it are made.

    Yields:
        The temporary folder, next to ``path``.

    Raises:
        OSError: the disk refuses, or somebody else has made ``path`` meanwhile.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(_temporary(path.name) + PARTIAL)
    temporary.mkdir()
    try:
        yield temporary
        mode = default_mode(temporary)
        for entry in sorted(temporary.rglob("*")):
            if entry.is_file():
                entry.chmod(mode)  # libraries write with a mode of their own: safetensors 0600
                sync_file(entry)
            elif entry.is_dir():
                sync_folder(entry)
        sync_folder(temporary)
        os.rename(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync_folder(path.parent)


def default_mode(folder: Path) -> int:
    """Return the permission bits of a new file in ``folder``: 0666 without the umask's bits, or what its ACL says.

    Found by making one: reading the umask would change it for the other threads meanwhile.
    """
    sample = folder / _temporary("mode")
    descriptor = os.open(sample, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        return stat.S_IMODE(os.fstat(descriptor).st_mode)
    finally:
        os.close(descriptor)
        sample.unlink(missing_ok=True)


def sync_file(path: Path) -> None:
    """Put the content of a file on the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Make the names in ``folder`` (new files, renames) survive a power failure, where the file system can."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in _NO_FOLDER_SYNC:
            return
        raise
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_FOLDER_SYNC:
            raise
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str, *, sync_name: bool = True) -> None:
    """Write UTF-8 text like `write_bytes`."""
    write_bytes(path, text.encode(), sync_name=sync_name)


def write_json(path: Path, data: Mapping[str, Any] | list[Any], *, sync_name: bool = True) -> None:
    """Write indented JSON like `write_bytes`; values that JSON does not know (NaN) are refused."""
    write_text(path, json.dumps(data, indent=2, allow_nan=False) + "\n", sync_name=sync_name)


def _temporary(name: str) -> str:
    return f".{name[:_LONGEST_KEPT]}.{secrets.token_hex(4)}"
