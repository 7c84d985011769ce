"""The terminal that a command prints its tables to."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import TextIO

from rich.console import Console, ConsoleOptions, ConsoleRenderable, RenderHook, RenderResult
from rich.measure import Measurement
from rich.segment import Segment
from rich.text import Text

from harness.visible import visible

UNFOLDED = 200
"""Columns of piped output: it is searched with grep and must not be folded at 80."""


def for_tables(stream: TextIO | None = None, *, stderr: bool = False, width: int | None = None) -> Console:
    """Build a console as wide as the terminal (or COLUMNS) that shows control characters instead of sending them.

    Args:
        stream: where it prints; None: standard output.
        stderr: print to standard error instead.
        width: columns where there is no terminal; None: `UNFOLDED`.
    """
    console = Console(file=stream, stderr=stderr, highlight=False)
    if not console.file.isatty() and not os.environ.get("COLUMNS", "").isdecimal():
        console.width = UNFOLDED if width is None else max(console.width, width)
    show_control_characters(console)
    return console


def show_control_characters(console: Console) -> None:
    """Let a console show control characters of what it prints as text (``\\x1b``)."""
    console.push_render_hook(_ShowControlCharacters())


def cell(text: object, style: str = "") -> Text:
    """Return one line of text of unknown origin for a table: no markup, no control characters."""
    return Text(visible(text), style=style)


class _ShowControlCharacters(RenderHook):
    """Replaces control characters in the text that is printed; rich's own styles are no part of it."""

    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        return [_Visible(renderable) for renderable in renderables]


class _Visible:
    def __init__(self, renderable: ConsoleRenderable) -> None:
        self._renderable = renderable

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for segment in console.render(self._renderable, options):
            yield segment if segment.control else Segment(_lines(segment.text), segment.style)

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement.get(console, options, self._renderable)


def _lines(text: str) -> str:
    # Line feeds are rich's own by now: it has broken the text into lines.
    parts: Iterable[str] = map(visible, text.split("\n"))
    return "\n".join(parts)
