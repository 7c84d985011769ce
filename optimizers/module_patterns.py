"""Patterns that choose hidden matrices by the names of their modules. Nothing here imports torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from types import MappingProxyType

NAMED: Mapping[str, tuple[str, ...] | None] = MappingProxyType(
    {
        "all": None,
        # run_glue.py of the public SUMO code lists these and output.dense, then leaves out every name with "output".
        "sumo_glue": ("query", "key", "value", "intermediate.dense"),
    }
)
"""Choice by name → its patterns; None: all hidden matrices."""


def matches(name: str, pattern: str) -> bool:
    """Return True if a dotted name contains a pattern: whole components in a row, with ``*`` and ``?`` as in a shell.

    ``query`` matches ``encoder.layer.0.attention.self.query.weight``, and ``output.dense`` also matches
    ``attention.output.dense``.
    """
    return fnmatchcase(f".{name}.", f"*.{pattern}.*")


def first_match(name: str, patterns: Iterable[str]) -> str | None:
    """Return the first pattern that a name contains, or None."""
    return next((pattern for pattern in patterns if matches(name, pattern)), None)
