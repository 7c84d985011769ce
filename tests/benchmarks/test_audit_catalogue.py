"""The catalogue of audited optimizers: its file, its page, and the programs of the page of defects."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks.audit_catalogue import entries, page
from benchmarks.audit_catalogue.entries import Entry
from harness import command_line

ROOT = Path(__file__).parents[2]
STORE = ROOT / "benchmarks" / "audit_catalogue" / "catalogue.json"
FINDINGS = (ROOT / "docs" / "audit_findings.md").read_text()
PROGRAMS = re.findall(
    r"^## (.*?)$.*?```python\n(.*?)```\s+```text\n(.*?)```", FINDINGS, re.MULTILINE | re.DOTALL
)


@pytest.mark.parametrize(("title", "program", "output"), PROGRAMS, ids=[title for title, *_ in PROGRAMS])
def test_program_of_a_finding_prints_what_the_page_says(title: str, program: str, output: str) -> None:
    pytest.importorskip("pytorch_optimizer")
    assert len(program.strip().splitlines()) <= 17, title
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            exec(program, {})
    except Exception as error:
        printed.write(f"{type(error).__name__}: {error}")
    assert printed.getvalue().startswith(output.strip())


def test_every_finding_has_a_program() -> None:
    assert len(PROGRAMS) == FINDINGS.count("\n## ") >= 8


def report(**changes: Any) -> dict[str, Any]:
    """Return one target as `optbench audit --json` prints it."""
    cell = {"engine": "ddp", "variant": "", "verdict": "safe", "reason": ""}
    return {
        "version": "pkg 1.2",
        "class": "matrix",
        "error": None,
        "notes": [],
        "cells": [
            cell,
            {**cell, "engine": "fsdp2", "variant": "uneven", "verdict": "wrong", "reason": "sees its shard"},
            {**cell, "engine": "zero1", "verdict": "crashes", "reason": "IndexError: 2-D"},
        ],
        "checks": [
            {"name": "resume", "passed": True, "detail": "the same steps"},
            {"name": "added group", "passed": False, "detail": "KeyError: 'use|x'"},
            {"name": "host syncs", "passed": None, "detail": "6 per step over 6 parameters (6 × item())"},
            {"name": "fused", "passed": None, "detail": "the groups have no fused"},
        ],
        **changes,
    }


def test_entries_survive_their_file(tmp_path: Path) -> None:
    entry, other = Entry("pkg.Wild"), Entry("pkg.Closure", error="needs a closure")
    entry.take(report())
    entries.write(tmp_path / "file.json", {"pkg.Wild": entry, "pkg.Closure": other})
    assert entries.read(tmp_path / "file.json") == {"pkg.Wild": entry, "pkg.Closure": other}
    assert entries.read(tmp_path / "none.json") == {}
    assert (entry.passed, list(entry.failed), list(entry.facts)) == (1, ["added group"], ["host syncs"])
    assert entry.cells == {"ddp": "safe", "fsdp2 uneven": "wrong", "zero1": "crashes"}


def test_a_later_run_adds_what_the_entry_lacks() -> None:
    entry = Entry("pkg.Wild")
    entry.take(report(checks=[]))
    assert entry.passed is None
    entry.take(report(cells=[]))
    assert entry.passed == 1
    assert entry.cells["zero1"] == "crashes"


def test_page_shows_every_entry() -> None:
    entry, other = Entry("pkg.Wild"), Entry("pkg.Closure", error="needs a closure")
    entry.take(report())
    text = page.text([entry, other])
    for words in (
        "| wrong |",
        "### pkg 1.2",
        "added group",
        "needs a closure",
        "0 are safe on all",
        "| 6 |",
    ):
        assert words in text, words


def test_committed_page_is_that_of_the_file() -> None:
    assert page.PAGE.read_text() == page.text(list(entries.read(STORE).values()))
    assert STORE.stat().st_size < 300_000


def test_workflow_of_the_page_is_accepted() -> None:
    """A workflow is YAML in which every step does one thing, and its command is one of optbench."""
    (source,) = re.findall(r"```text\n(.*?)```", page.HEAD.read_text(), re.DOTALL)
    workflow = yaml.safe_load(source)
    (job,) = workflow["jobs"].values()
    assert all(("uses" in step) != ("run" in step) for step in job["steps"])
    (line,) = [step["run"] for step in job["steps"] if step.get("run", "").startswith("optbench ")]
    arguments = command_line.parse("audit", line.split()[2:])
    assert arguments.options.ci
    assert arguments.options.out == "audit"
    assert arguments.rest == ["mypackage.MyOptimizer"]
