"""Lock files that the system frees when a process dies, and what to do where a file system has none."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from filelock import BaseFileLock, FileLock

from harness.errors import InputError

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)


def acquire(path: Path, *, key: str, timeout: float = -1) -> BaseFileLock:
    """Take the lock file ``path``; returns the lock, which ``release()`` frees.

    Args:
        path: the lock file; its folder must exist.
        key: configuration key that moves it to another disk, for the message.
        timeout: seconds to wait while another process holds it; -1: without end, 0: not at all.

    Raises:
        filelock.Timeout: another process holds it.
        InputError: its file system has no locks (some network disks); names the file system and the way out.
        OSError: the file cannot be written.
    """
    # A soft lock, which `filelock` falls back to, would outlive a process that is killed.
    lock = FileLock(path, timeout=timeout, fallback_to_soft=False)
    try:
        lock.acquire()
    except (OSError, NotImplementedError) as error:
        number = error.errno if isinstance(error, OSError) else errno.ENOSYS
        if number not in _NO_LOCKS:
            raise
        raise InputError(
            key,
            path.parent,
            f"is on {file_system(path.parent)}, which gives no file locks ({os.strerror(number)})",
            allowed="a local disk, or a network disk mounted with locks (NFS: rpc.statd, or -o local_lock=flock)",
            fix=f"{key}=FOLDER_ON_ANOTHER_DISK",
        ) from error
    return lock


def file_system(path: Path) -> str:
    """Return type and mount point of the file system that holds ``path``, as in "nfs4 (mounted at /home)"."""
    import psutil

    place = path.resolve()
    mounts = [
        (len(Path(mount.mountpoint).parts), index, mount)
        for index, mount in enumerate(psutil.disk_partitions(all=True))
        if place.is_relative_to(mount.mountpoint)
    ]
    if not mounts:
        return "a file system of unknown type"
    # The deepest mount point, and of several mounts at one place the last.
    mount = max(mounts)[2]
    return f"{mount.fstype} (mounted at {mount.mountpoint})"
