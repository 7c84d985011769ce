"""From what a user writes for files to the files: existing paths first, then glob patterns."""

from __future__ import annotations

import glob
import os
import re
import shlex
import stat
from pathlib import Path


def expand(pattern: str) -> list[Path]:
    """Return the paths that ``pattern`` names: itself if it exists, else its matches as a glob, sorted.

    ``~`` and ``**`` work. The leading folders of a pattern that exist are taken as they are written, so that
    ``runs[2]/*.txt`` finds the files of the folder ``runs[2]``; `glob.escape` writes ``[[]`` for a ``[``.
    """
    for path in (pattern, os.path.expanduser(pattern)):
        if path and "\0" not in path and os.path.lexists(path):
            return [Path(path)]
    expanded = os.path.expanduser(pattern)
    if "\0" in expanded:
        return []
    folder, rest = _existing_folder(expanded)
    matches = glob.glob(glob.escape(folder) + rest, recursive=True) or glob.glob(expanded, recursive=True)
    return sorted(Path(match) for match in matches)


def kind(path: Path | str) -> str | None:
    """Return what ``path`` is if it is not a regular file, as in "is a named pipe"; None for a regular file."""
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        if os.path.islink(path):
            return f"is a symbolic link to {os.readlink(path)}, which does not exist"
        return "does not exist"
    except (OSError, ValueError) as error:
        return f"cannot be read ({getattr(error, 'strerror', None) or error})"
    if stat.S_ISREG(mode):
        return None
    names = {
        stat.S_IFDIR: "is a folder",
        stat.S_IFIFO: "is a named pipe, not a file",
        stat.S_IFSOCK: "is a socket, not a file",
        stat.S_IFCHR: "is a device, not a file",
        stat.S_IFBLK: "is a device, not a file",
    }
    return names.get(stat.S_IFMT(mode), "is not a file")


def listed(key: str, path: str) -> str:
    """Return ``key=[path]`` as it is typed in a shell, quoted where Hydra's grammar or the shell needs it."""
    if re.fullmatch(r"[\w./*?-]+", path):
        return f"{key}=[{path}]"
    quoted = path.replace('"', '\\"')
    return shlex.quote(f'{key}=["{quoted}"]')


def _existing_folder(pattern: str) -> tuple[str, str]:
    """Return the longest leading part of ``pattern`` that is an existing folder, and the rest."""
    end = len(pattern)
    while (end := pattern.rfind("/", 0, end)) >= 0:
        if os.path.isdir(pattern[: end + 1]):
            return pattern[: end + 1], pattern[end + 1 :]
    return "", pattern
