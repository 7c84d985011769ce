"""Values with a format of their own: durations, and names that become folders. Torch-free."""

from __future__ import annotations

import math
import re
from pathlib import Path

from harness.errors import InputError
from harness.visible import visible

_SECONDS = {"d": 86400.0, "h": 3600.0, "m": 60.0, "s": 1.0}
_UNITS = re.compile(r"(?:(\d+(?:\.\d+)?)d)?(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m)?(?:(\d+(?:\.\d+)?)s)?")
_CLOCK = re.compile(r"(?:(\d+)-)?(\d+):(\d+)(?::(\d+))?")
DURATIONS = "seconds, 90m, 2h30m, 01:30:00 or 1-12:00:00"


def duration_seconds(key: str, value: str | int | float | None) -> float | None:
    """Return a duration in seconds; None for None.

    "90", 90 and 90.0 are seconds; "1d2h30m" sums its units; "H:M:S" and "D-H:M[:S]" are SLURM's, and so is "M:S".

    Raises:
        InputError: it is not a duration, or not longer than 0.
    """
    if value is None:
        return None
    found = _duration(value)
    if found is None or not math.isfinite(found) or found <= 0:
        raise InputError(key, value, "is not a duration", allowed=DURATIONS, fix=f"{key}=90m")
    return found


def _duration(value: str | int | float) -> float | None:
    if isinstance(value, int | float):
        return float(value)
    text = value.strip().lower()
    try:
        return float(text)
    except ValueError:
        pass
    if clock := _CLOCK.fullmatch(text):
        days, first, second, third = clock.groups()
        if third is None and days is None:
            return int(first) * 60.0 + int(second)
        return int(days or 0) * 86400.0 + int(first) * 3600.0 + int(second) * 60.0 + int(third or 0)
    units = _UNITS.fullmatch(text)
    if text and units:
        return sum(float(part or 0) * size for part, size in zip(units.groups(), _SECONDS.values()))
    return None


MAX_BYTES = 200
"""Of one name. File systems take 255, and files next to a folder have longer names than it."""
MAX_PATH_BYTES = 3000
"""Of a run folder with all folders above it; Linux takes 4095, and files inside have longer paths."""
_FORBIDDEN = frozenset('/\\:*?"<>|')


def check_folder_name(key: str, name: str) -> None:
    """Refuse a name that is not a plain folder name.

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
    fix = f"{key}={visible(clean_folder_name(name))[:100] or 'mine'}"
    raise InputError(key, visible(name)[:300] or "''", "leaves its folder", allowed=allowed, fix=fix)


def clean_folder_name(name: str) -> str:
    """Return the name with characters that `check_folder_name` refuses replaced by "-"; "" if no others are left."""
    return "".join(letter if _is_plain(letter) else "-" for letter in name).strip(" .-") if name else ""


def check_run_folder(folder: Path, inside: Path) -> None:
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
