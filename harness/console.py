"""The terminal that a command prints its tables to."""

from __future__ import annotations

from typing import TextIO

from rich.console import Console

UNFOLDED = 200
"""Columns of piped output: it is searched with grep and must not be folded at 80."""


def for_tables(stream: TextIO | None = None) -> Console:
    """A console as wide as the terminal, or `UNFOLDED` columns where there is none.

    Args:
        stream: where it prints; None: standard output.
    """
    console = Console(file=stream, highlight=False)
    if not console.file.isatty():
        console.width = UNFOLDED
    return console
