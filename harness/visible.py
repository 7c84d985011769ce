"""Text of unknown origin, made safe for one kind of output each: terminal and HTML, Markdown, CSV. Torch-free.

Names, labels and reasons of runs come from command lines, other programs and damaged files. JSON needs nothing but
`json.dumps(…, allow_nan=False)` of what `visible` returned.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from functools import lru_cache

# Marks that reorder what follows them: the text "cod.exe" can be shown as "exe.doc".
_BIDI = {0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A)}
_FORMULA = "=+-@\t\r\n＝＋－＠"
_MARKDOWN = re.compile(r"[\\`*|~]|(?<!\w)_|_(?!\w)|\](?=[(\[:])")


def visible(text: object) -> str:
    """Return ``text`` in one line without control characters: escape sequences, line feeds, reordering marks.

    White space of any kind becomes a space; every other control character, and half of a surrogate pair, becomes its
    escaped form (``\\x1b``), so that a reader sees that it was there.
    """
    text = str(text)
    return text if text.isascii() and text.isprintable() else "".join(map(_visible, text))


@lru_cache(4096)
def _visible(character: str) -> str:
    if character.isprintable() and ord(character) not in _BIDI:
        return character
    if character in "\t\n\v\f\r\x85\u2028\u2029":
        return " "
    # Joiners of emoji, spaces of several widths and unassigned characters change nothing but themselves.
    if unicodedata.category(character) not in ("Cc", "Cs") and ord(character) not in _BIDI:
        return character
    return character.encode("unicode_escape", "backslashreplace").decode("ascii")


def markdown(text: object) -> str:
    """Return ``text`` as one line of GitHub-flavoured Markdown that shows it literally, also in a table's cell."""
    safe = visible(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return _MARKDOWN.sub(r"\\\g<0>", safe)


def markdown_row(cells: Iterable[object]) -> str:
    """Return a row of a Markdown table."""
    return f"| {' | '.join(map(markdown, cells))} |"


def csv_cell(value: object) -> str:
    """Return a cell that no spreadsheet evaluates: a text that begins like a formula gets an apostrophe.

    Numbers, and texts that are numbers, stay as they are.
    """
    if isinstance(value, int | float):
        return repr(value)
    text = visible(value)
    begins = str(value).lstrip(" ")[:1] or text.lstrip()[:1]
    if begins and begins in _FORMULA and not _is_number(text):
        return "'" + text
    return text


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return "_" not in text
