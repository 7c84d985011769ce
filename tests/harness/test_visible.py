"""Texts of unknown origin, for each kind of output: nothing in them acts, and they stay recognizable."""

from __future__ import annotations

import csv
import io
import json
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from rich.table import Table

from harness.console import cell, for_tables
from harness.visible import csv_cell, markdown, markdown_row, visible

HOSTILE = [
    "\x1b[2J\x1b]0;title\x07",
    "a\u202egnp.exe",
    "line\nfeed\r\nx\u2028y",
    "\x9b31m",
    "\ud800",
    "tab\there",
]
HOSTILE += ["<script>alert(1)</script>", "=1+1", "[red]x[/red]", "a|b", "](javascript:alert(1))", "\x00"]


def acts(text: str) -> bool:
    """Whether a terminal would do something else than show the characters."""
    return any(
        unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") or c in "\u202a\u202b\u202e\u2066\u200f"
        for c in text
    )


@pytest.mark.parametrize("text", HOSTILE)
def test_visible_text_acts_no_more(text: str) -> None:
    assert not acts(visible(text))
    visible(text).encode()
    assert visible(visible(text)) == visible(text)


@given(st.text(st.characters()))
def test_any_text_acts_no_more_and_ordinary_text_stays(text: str) -> None:
    assert not acts(visible(text))
    if text.isascii() and text.isprintable():
        assert visible(text) == text


@pytest.mark.parametrize("text", ["sumo-seed0", "café", "👩‍👩‍👧", "模型", "a b", "val/loss 3.31 ± 0.02"])
def test_ordinary_names_stay(text: str) -> None:
    assert visible(text) == text


@pytest.mark.parametrize("text", HOSTILE)
def test_a_console_shows_what_it_was_given(text: str) -> None:
    stream = io.StringIO()
    console = for_tables(stream)
    table = Table()
    table.add_column(cell(text))
    table.add_row(text.replace("[", "("), cell(text))
    console.print(table)
    console.print(text, markup=False)
    assert not acts(stream.getvalue().replace("\n", ""))


@pytest.mark.parametrize(
    "text", [*HOSTILE, "*x* _y_ `z` ~q~ \\", "![i](http://x)", "&lt;", "a_b_c", "# h", "[red]x|y"]
)
def test_markdown_shows_the_text_literally(text: str) -> None:
    page = (
        MarkdownIt("js-default")
        .enable("table")
        .render(f"{markdown_row(['h', 'k'])}\n|--|--|\n{markdown_row([text, 1])}\n")
    )
    assert page.count("<td>") == 2
    inside = page.split("<td>")[1].split("</td>")[0]
    assert "<" not in inside
    shown = inside.replace("&lt;", "<").replace("&gt;", ">").replace("&quot;", '"').replace("&amp;", "&")
    assert shown == visible(text).strip()


@pytest.mark.parametrize(
    "text", ["=1+1", "+1+1", "-1+cmd", "@SUM(A1)", "\t=1", "\r=1", " =1", "\n@x", "＝1+1"]
)
def test_no_cell_is_a_formula(text: str) -> None:
    out = io.StringIO()
    csv.writer(out).writerow([csv_cell(text)])
    (row,) = csv.reader(io.StringIO(out.getvalue()))
    assert row[0].startswith("'")


@pytest.mark.parametrize(
    "value", [-0.5, 1e-7, 3, "-0.5", "+3", "1e-7", "-inf", "sumo", "", "a=b", "x@y", "–"]
)
def test_numbers_and_names_stay_what_they_are(value: object) -> None:
    assert csv_cell(value) == str(value)


def test_json_of_visible_text_is_plain() -> None:
    assert json.loads(json.dumps([visible(text) for text in HOSTILE], allow_nan=False))
    assert markdown("a<b") == "a&lt;b"
