"""Markdown of docs/RESULTS.md: tables, and numbers with a proper minus sign."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table; all columns are aligned to the left."""
    lines = ["| " + " | ".join(heads) + " |", "|" + " --- |" * len(heads)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def fixed(value: float, digits: int = 4) -> str:
    """Return a number with a fixed number of decimals; a dash if it is not finite."""
    return f"{value:.{digits}f}".replace("-", "−") if math.isfinite(value) else "–"


def render(template: str, values: Mapping[str, Any]) -> str:
    """Return a template of this package, filled in."""
    environment = Environment(
        loader=PackageLoader("analysis.results"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # Markdown of numbers and of names of folders
    )
    return environment.get_template(template).render(values)
