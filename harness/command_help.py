"""The text of `optbench --help` and `optbench COMMAND --help`, from the table in `harness.commands`."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Iterator, Sequence

from harness.commands import COMMANDS, HEADINGS, JSON, load


def overview() -> str:
    """Return the text of `optbench --help`."""
    grouped = {name for names in HEADINGS.values() for name in names}
    others = tuple(name for name in COMMANDS if name not in grouped)
    lines = ["optbench: train and compare optimizers of language models, on one process or many", ""]
    lines += ["usage: optbench COMMAND …"]
    for heading, names in [*HEADINGS.items(), ("other", others)]:
        rows = [(name, COMMANDS[name].summary) for name in names if name in COMMANDS]
        if rows:
            lines += ["", f"{heading}:", *_rows(rows, max(map(len, COMMANDS)))]
    lines += ["", "help:"]
    lines += _rows(
        [
            ("optbench COMMAND --help", "arguments, examples and keys of a command"),
            ("optbench COMMAND --json", "one JSON document on standard output instead of tables"),
        ]
    )
    lines += ["", "first command: optbench compare adamw muon galore sumo preset=quickstart"]
    return "\n".join(line for text in lines for line in _wrapped(text))


def command_help(name: str) -> str:
    """Return the text of `optbench NAME --help`."""
    command = COMMANDS[name]
    options = (*command.options, JSON)
    usage = " ".join(["usage: optbench", name, command.usage, *(f"[{option.usage}]" for option in options)])
    lines = [
        *_wrapped(f"optbench {name}: {command.summary}"),
        "",
        *_wrapped(" ".join(usage.split()), 16),
        "",
        "examples:",
    ]
    for arguments, note in command.examples:
        lines += _wrapped(f"  optbench {name} {arguments}".rstrip(), 6)
        lines += _wrapped(f"      {note}")
    rows = [(", ".join((option.usage, *option.names[1:])), option.meaning) for option in options]
    lines += ["", "options:", *_rows([*command.arguments, *rows])]
    for text in _key_texts(name):
        lines.append("")
        for line in text.splitlines():
            lines += _wrapped(line, len(line) - len(line.lstrip()) + 4 if line.startswith(" ") else 0)
    return "\n".join(lines)


def _key_texts(name: str) -> Iterator[str]:
    if COMMANDS[name].keys:
        yield load(COMMANDS[name].keys)()
    if COMMANDS[name].takes_keys:
        yield load("harness.listing:keys_text")()


def _width() -> int:
    """Return the columns of the terminal (or of COLUMNS); 80 where there is none."""
    return max(30, shutil.get_terminal_size((80, 24)).columns)


def _rows(rows: Sequence[tuple[str, str]], column: int | None = None) -> list[str]:
    """Set two columns next to each other, or where they do not fit, the second one below the first."""
    width = max(len(first) for first, _ in rows) if column is None else column
    if width + 4 + 20 > _width():
        return [
            line
            for first, second in rows
            for line in (*_wrapped(f"  {first}", 6), *_wrapped(f"      {second}"))
        ]
    return [line for first, second in rows for line in _wrapped(f"  {first:<{width}}  {second}", width + 4)]


def _wrapped(text: str, indent: int | None = None) -> list[str]:
    """Break text into lines that fit the terminal; ``indent``: of every line but the first."""
    own = len(text) - len(text.lstrip(" "))
    further = " " * min(own if indent is None else indent, _width() // 2)
    return textwrap.wrap(
        text,
        _width(),
        subsequent_indent=further,
        break_long_words=False,
        break_on_hyphens=False,
        replace_whitespace=False,
        drop_whitespace=True,
    ) or [""]
