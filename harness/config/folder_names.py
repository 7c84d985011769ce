"""Names that become folders: what they may hold, and how long they may be. Torch-free."""

from __future__ import annotations

from pathlib import Path

from harness.errors import InputError
from harness.visible import visible

MAX_BYTES = 200
"""Of one name. File systems take 255, and files next to a folder have longer names than it."""
MAX_PATH_BYTES = 3000
"""Of a run folder with all folders above it; Linux takes 4095, and files inside have longer paths."""
_FORBIDDEN = frozenset('/\\:*?"<>|')


def check(key: str, name: str) -> None:
    """Refuse a name that is no plain folder name.

    Args:
        key: whose value it is, for the error.
        name: as given.

    Raises:
        InputError: it is empty, leads elsewhere, is hidden, is too long, or holds characters that a file system, a
            shell or a terminal takes for something else.
    """
    is_plain = all(map(_is_plain, name)) and name.strip() == name and name not in ("", ".", "..")
    if is_plain and len(name.encode()) <= MAX_BYTES:
        return
    allowed = f"a folder name of at most {MAX_BYTES} bytes, without / and .."
    fix = f"{key}={visible(clean(name))[:100] or 'mine'}"
    raise InputError(key, visible(name)[:300] or "''", "leaves its folder", allowed=allowed, fix=fix)


def clean(name: str) -> str:
    """Return the name with what `check` refuses replaced by "-", its length apart; "" for a name of such alone."""
    return "".join(letter if _is_plain(letter) else "-" for letter in name).strip(" .-") if name else ""


def check_path(folder: Path, inside: Path) -> None:
    """Refuse a run folder that is not in the folder of its group, or whose path is too long.

    Args:
        folder: of the run.
        inside: folder that it must be in.

    Raises:
        InputError: see above.
    """
    if folder.parent != inside or folder.name in ("", ".", ".."):
        raise InputError("name", visible(folder), f"is not a folder in {visible(inside)}", fix="name=mine")
    if (length := len(bytes(folder.absolute()))) > MAX_PATH_BYTES:
        allowed = f"at most {MAX_PATH_BYTES} bytes"
        raise InputError(
            "runs_dir", f"a path of {length} bytes", "is too long", allowed=allowed, fix="runs_dir=runs"
        )


def _is_plain(letter: str) -> bool:
    is_control = ord(letter) < 32 or 127 <= ord(letter) < 160 or visible(letter) != letter
    return not is_control and letter not in _FORBIDDEN
