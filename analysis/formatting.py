"""Format numbers for tables, sentences and plots, and convert values to JSON data."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

MISSING = "–"


def loss(value: float) -> str:
    """Format nats per token to 0.0001."""
    return f"{value:.4f}" if math.isfinite(value) else MISSING


def significant(value: float, digits: int = 3) -> str:
    """Format a number with ``digits`` significant digits and groups of thousands."""
    if not math.isfinite(value):
        return MISSING
    if value == 0:
        return "0"
    if abs(value) >= 10 ** (digits - 1):
        return grouped(value) if abs(value) < 1e15 else f"{value:.{digits - 1}e}"
    if abs(value) < 1e-4:
        return f"{value:.{digits - 1}e}"
    places = digits - 1 - math.floor(math.log10(abs(value)))
    return f"{value:.{places}f}"


def grouped(value: float) -> str:
    """Format an integer with groups of thousands."""
    return f"{round(value):,}".replace(",", "\u202f") if math.isfinite(value) else MISSING


def size(bytes_: float) -> str:
    """Format bytes in the binary unit that needs at most three digits."""
    if not math.isfinite(bytes_):
        return MISSING
    value, units = float(bytes_), ["B", "KiB", "MiB", "GiB", "TiB"]
    while abs(value) >= 1024 and len(units) > 1:
        value /= 1024
        units.pop(0)
    return f"{value:.0f} {units[0]}" if units[0] == "B" or value >= 100 else f"{value:.3g} {units[0]}"


def count(value: float) -> str:
    """Format a large count with a unit of thousands: 1.31 M."""
    if not math.isfinite(value):
        return MISSING
    for scale, unit in ((1e12, " T"), (1e9, " B"), (1e6, " M"), (1e3, " k")):
        if abs(value) >= scale:
            return f"{value / scale:.3g}{unit}"
    return f"{value:.3g}"


def seconds(value: float) -> str:
    """Format a duration as seconds, minutes or hours."""
    if not math.isfinite(value):
        return MISSING
    if value < 100:
        return f"{value:.3g} s"
    minutes, rest = divmod(round(value), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def p_value(value: float) -> str:
    """Format a p-value: ``p = 0.012`` or ``p < 0.0001``."""
    if not math.isfinite(value):
        return "p not testable"
    return "p < 0.0001" if value < 1e-4 else f"p = {value:.2g}" if value < 0.1 else f"p = {value:.2f}"


def listing(words: Sequence[str], last: str = "and") -> str:
    """Join words: ``a, b and c``."""
    if len(words) < 2:
        return "".join(words)
    return f"{', '.join(words[:-1])} {last} {words[-1]}"


def plural(n: int, word: str, many: str | None = None) -> str:
    """Format a count with its noun: ``1 run``, ``2 runs``."""
    return f"{n} {word if n == 1 else many or word + 's'}"


def to_jsonable(value: Any) -> Any:
    """Convert a value to JSON data: arrays and tuples become lists, keys become strings, non-finite floats null."""
    if isinstance(value, Mapping):
        return {str(key): to_jsonable(entry) for key, entry in value.items()}
    if isinstance(value, np.ndarray | list | tuple):
        return [to_jsonable(entry) for entry in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
