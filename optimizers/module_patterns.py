"""Patterns that choose hidden matrices by the names of their modules. Nothing here imports torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from types import MappingProxyType

from optimizers.options import OptionError

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


def check_used(patterns: Iterable[str], names: Iterable[str]) -> None:
    """Refuse a pattern that names no hidden matrix: it is a misspelling, or of another model.

    Args:
        patterns: of `matrix_modules`.
        names: of all hidden matrices.

    Raises:
        OptionError: naming the pattern and the last components that the names of hidden matrices have.
    """
    names = list(names)
    for pattern in patterns:
        if not any(matches(name, pattern) for name in names):
            # "default" is the only adapter's name.
            parts = [[part for part in name.split(".")[:-1] if part != "default"] for name in names]
            known = list(dict.fromkeys(".".join(part[-1:]) for part in parts if part))
            raise OptionError(
                "matrix_modules", pattern, "is in the name of no hidden matrix", known or ("null",)
            )
