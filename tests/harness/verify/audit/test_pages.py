"""Pages of an audit: everything that was found is on them, and no text of others becomes markup."""

from __future__ import annotations

import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from harness.verify.audit import pages, tables
from harness.verify.audit.document import CellReport, Check, TargetReport

NASTY = "pkg.<script>alert(1)</script>|x"


def report(**changes: object) -> TargetReport:
    """Return a target with a cell of each verdict and a check of each result."""
    content: dict[str, object] = {
        "target": "pkg.Wild",
        "update_class": "matrix",
        "explanation": "columns changed with a gradient of their row",
        "version": "pkg 2.1",
        "notes": ("it takes 2-D parameters only",),
        "cells": (
            CellReport("ddp", 2, "safe", 2.5e-7),
            CellReport("fsdp2", 2, "safe", 3e-7),
            CellReport("fsdp2", 2, "wrong", 0.31, 1, "q.weight", "shards are orthogonalized", "uneven"),
            CellReport("zero1", 2, "refused", reason="says that slices are not supported"),
            CellReport("zero3", 2, "crashes", first_step=2, reason="IndexError: too many indices"),
        ),
        "checks": (
            Check("resume", True, "the same steps"),
            Check("lr schedule", False, "keeps a copy of the rate", "import torch\nprint(1)"),
            Check("fused", None, "the groups have no fused"),
        ),
    }
    return TargetReport(**{**content, **changes})  # type: ignore[arg-type]


class Reader(HTMLParser):
    """Collect the tags and the text of a page, and check that tags are closed in order."""

    VOID = frozenset({"meta", "br"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.text = ""
        self.ids: list[str] = []
        self.targets: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.ids += [value or "" for key, value in attrs if key == "id"]
        self.targets += [(value or "").removeprefix("#") for key, value in attrs if key == "href"]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def read(page: str) -> Reader:
    """Parse a page."""
    reader = Reader()
    reader.feed(page)
    assert not reader.open
    return reader


def test_every_file_is_written_and_holds_the_findings(tmp_path: Path) -> None:
    paths = pages.write([report(), report(target="pkg.Tame", cells=(), checks=())], tmp_path)
    assert [path.name for path in paths] == ["audit.html", "audit.md", "badge.md"]
    page, text, badge = (path.read_text() for path in paths)
    for content in (read(page).text, text):
        for words in (
            "pkg.Wild",
            "wrong (uneven)",
            "shards are orthogonalized",
            "3.1e-1",
            "IndexError",
            "pkg 2.1",
        ):
            assert words in content, words
        assert "import torch\nprint(1)" in content
    assert badge.count("optbench audit") == 2


def test_links_of_the_page_lead_somewhere() -> None:
    reader = read(pages.html([report(), report(target="torch.optim.AdamW(lr=0.1)")]))
    assert reader.targets
    assert set(reader.targets) <= set(reader.ids)


@pytest.mark.parametrize("place", ["target", "error", "version", "explanation"])
def test_foreign_text_is_no_markup(place: str) -> None:
    found = [report(**{place: NASTY})]
    assert "script" not in read(pages.html(found)).tags
    assert "<script" not in pages.text(found)
    assert "<script" not in pages.badges(found)


def test_table_rows_have_the_columns_of_their_head() -> None:
    found = [report(target=NASTY), report(error="needs a closure", target="pkg.Closure")]
    rows = [line for line in pages.text(found).splitlines() if line.startswith("|")]
    widths = {len(re.findall(r"(?<!\\)\|", line)) for line in rows}
    # Summary (7 columns), refused (2), cells (8), checks (3).
    assert widths == {8, 3, 9, 4}


def test_worst_verdict_of_an_engine_names_its_variants() -> None:
    assert tables.verdict_of(report(), "ddp") == "safe"
    assert tables.verdict_of(report(), "fsdp2") == "wrong (uneven)"
    assert tables.verdict_of(report(), "hsdp") == tables.MISSING


def test_badge_tells_what_is_bad_too() -> None:
    assert tables.badge(report(), "https://example.org/audit") == (
        "**pkg.Wild** (matrix): safe on ddp; refused on zero1; crashes on zero3; wrong on fsdp2; "
        "1 of 2 checks passed ([optbench audit](https://example.org/audit), pkg 2.1)"
    )


def test_controls_are_no_verdict_of_an_engine() -> None:
    control = CellReport("ddp", 2, "wrong", 1.0, control="plain SGD under Muon's name")
    assert tables.verdict_of(report(cells=(CellReport("ddp", 2, "safe"), control)), "ddp") == "safe"
    assert tables.bad_cells(report(cells=(control,))) == []


def test_pages_need_no_torch() -> None:
    code = "import sys, harness.verify.audit.pages; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
