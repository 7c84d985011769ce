"""Lengths of time as people and SLURM write them."""

from __future__ import annotations

import math
import re

from harness.errors import InputError

_UNITS = {"d": 86400.0, "h": 3600.0, "m": 60.0, "s": 1.0}
_WITH_UNITS = re.compile(
    r"(?:(\d+(?:\.\d+)?)d)?(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m)?(?:(\d+(?:\.\d+)?)s)?"
)
_CLOCK = re.compile(r"(?:(\d+)-)?(\d+):(\d+)(?::(\d+))?")
ALLOWED = "seconds, 90m, 2h30m, 01:30:00 or 1-12:00:00"


def seconds(key: str, value: str | int | float | None) -> float | None:
    """Seconds that a value means; None for None.

    "90", 90 and 90.0 are seconds; "1d2h30m" sums its units; "H:M:S" and "D-H:M[:S]" are SLURM's, and so is "M:S".

    Raises:
        InputError: it is no length of time, or not longer than 0.
    """
    if value is None:
        return None
    found = _parsed(value)
    if found is None or not math.isfinite(found) or found <= 0:
        raise InputError(key, value, "is no length of time", allowed=ALLOWED, fix=f"{key}=90m")
    return found


def _parsed(value: str | int | float) -> float | None:
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
    units = _WITH_UNITS.fullmatch(text)
    if text and units:
        return sum(float(part or 0) * size for part, size in zip(units.groups(), _UNITS.values()))
    return None
