"""The catalogue of audited optimizers: its file, its page, and the programs of the page of defects."""

from __future__ import annotations

import contextlib
import io
import re
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from benchmarks.audit_catalogue import entries, measure, page, special
from benchmarks.audit_catalogue.entries import Entry
from harness import command_line
from harness.errors import InputError
from harness.verify.audit.cells import EngineCell
from harness.verify.audit.document import CellReport, Check, TargetReport
from harness.verify.audit.targets import Target, TargetError

ROOT = Path(__file__).parents[2]
STORE = ROOT / "benchmarks" / "audit_catalogue" / "catalogue.json"
FINDINGS = (ROOT / "docs" / "audit_findings.md").read_text()
PROGRAMS = re.findall(
    r"^## (.*?)$.*?```python\n(.*?)```\s+```text\n(.*?)```", FINDINGS, re.MULTILINE | re.DOTALL
)


@pytest.mark.parametrize(("title", "program", "output"), PROGRAMS, ids=[title for title, *_ in PROGRAMS])
def test_program_of_a_finding_prints_what_the_page_says(title: str, program: str, output: str) -> None:
    for package in re.findall(r"^import (\w+)", program, re.MULTILINE):
        if package == "galore_torch":
            # Other tests import parts of it without bitsandbytes, which the whole needs.
            pytest.importorskip("bitsandbytes")
        pytest.importorskip(package, exc_type=ImportError)
    assert len(program.strip().splitlines()) <= 17, title
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            exec(program, {})
    except Exception as error:
        printed.write(f"{type(error).__name__}: {error}")
    assert printed.getvalue().startswith(output.strip())


def test_every_finding_has_a_program() -> None:
    assert len(PROGRAMS) == FINDINGS.count("\n## ") >= 12


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


def test_page_says_what_measured_its_rows_and_what_is_missing() -> None:
    rows = [
        Entry(f"pkg.{name}", core=core) for name, core in zip("ABC", ("1111", "1111", "2222"), strict=True)
    ]
    for entry in rows:
        entry.take(report())
    same = page.text(rows[:2])
    assert "the audit whose sources have the digest `1111` measured every row." in same.lower()
    assert "not measured yet" not in same
    mixed = page.text([*rows, Entry("pkg.D"), Entry("other.E")])
    assert (
        "digest `1111` measured every row, except: the audit whose sources have the digest `2222` measured pkg.C."
        in (mixed)
    )
    assert "**2 optimizers are not measured yet** and are in no table: 1 of pkg, 1 of other." in mixed
    assert "pkg.D" not in mixed
    for package in ("dion", "emerging-optimizers"):
        assert f"| {package}" in mixed


def test_verdicts_that_the_gradients_hide_are_not_given(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden = special.Understated("global", "one number of all parameters that its first steps do not show")
    monkeypatch.setattr(page, "UNDERSTATED", {"pkg.Wild": hidden})
    monkeypatch.setattr(page, "REMARKS", {"pkg.Quiet": "it draws its first state"})
    wild, quiet = Entry("pkg.Wild"), Entry("pkg.Quiet")
    cells = [
        {"engine": engine, "variant": "", "verdict": verdict, "reason": ""}
        for engine, verdict in (("single", "safe"), ("ddp", "safe"), ("fsdp2", "crashes"), ("zero1", "safe"))
    ]
    for entry in (wild, quiet):
        entry.take(report(cells=cells, **{"class": "elementwise"}))
    text = page.text([wild, quiet])
    rows = [line for line in text.splitlines() if line.startswith("| Wild")]
    assert rows == [r"| Wild | global\* | safe | safe | crashes | not shown | added group |"]
    assert r"| Quiet | elementwise\* | safe | safe | crashes | safe | added group |" in text
    assert "| pkg.Wild | one number of all parameters" in text
    assert "| pkg.Quiet | it draws its first state" in text
    # The file keeps what was measured.
    assert wild.cells["zero1"] == "safe"


def test_rules_that_need_a_rank_are_audited_with_one() -> None:
    galore = pytest.importorskip("pytorch_optimizer").GaLore
    target = special.audited(Target("pytorch_optimizer.GaLore"))
    weight, norm = (torch.nn.Parameter(torch.zeros(shape)) for shape in ((6, 8), (8,)))
    built = target.load()([weight, norm], **target.arguments)
    assert isinstance(built, galore)
    assert [group.get("rank") for group in built.param_groups] == [4, None]
    generator = torch.Generator().manual_seed(0)
    weight.grad, norm.grad = torch.randn(6, 8, generator=generator), torch.ones(8)
    built.step()
    # The update has the rank that was asked for, unlike Adam's.
    assert int(torch.linalg.matrix_rank(weight.detach(), rtol=1e-4)) == 4
    plain = galore([weight])
    with torch.no_grad():
        weight.zero_()
    plain.step()
    assert int(torch.linalg.matrix_rank(weight.detach(), rtol=1e-4)) == 6
    # Slices of ZeRO are no matrices.
    assert [group.get("rank") for group in target.load()([norm], **target.arguments).param_groups] == [None]
    assert special.audited(Target("torch.optim.AdamW")) == Target("torch.optim.AdamW")


def test_a_package_that_compiles_itself_is_audited_without_that(monkeypatch: pytest.MonkeyPatch) -> None:
    package = types.ModuleType("heavyball")
    vars(package).update(utils=types.SimpleNamespace(compile_mode="default"), AdamW=torch.optim.AdamW)
    monkeypatch.setitem(sys.modules, "heavyball", package)
    target = special.audited(Target("heavyball.AdamW"))
    monkeypatch.delitem(sys.modules, target.name.rpartition(".")[0], raising=False)
    assert target.load() is torch.optim.AdamW
    assert package.utils.compile_mode is None
    monkeypatch.delitem(sys.modules, target.name.rpartition(".")[0])
    entry = Entry("heavyball.AdamW")
    entry.take(report(version="heavyball 3.2.1"))
    assert "compile_mode = None" in page.text([entry])
    assert "compile_mode" not in page.text([Entry("pkg.Wild", cells=entry.cells)])


class Recorded:
    """Stands for the processes of an audit: everything passes at once."""

    def __init__(self, *_: object) -> None:
        self.asked: list[tuple[str, int, bool]] = RECORDED

    def __enter__(self) -> Recorded:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing to end."""

    def members(self, package: str) -> list[Target]:
        """Return two optimizers, or fail as for a package that is not installed."""
        if package != "pkg":
            raise InputError("--all", package, "cannot be imported")
        return [Target("pkg.A"), Target("pkg.B")]

    def probe(self, target: Target) -> Target:
        """Refuse one of them."""
        if target.name == "pkg.B":
            raise TargetError("needs a closure")
        return target

    def audit(self, target: Target, lacking: list[EngineCell], *, has_checks: bool) -> TargetReport:
        """Return a report of what is asked."""
        self.asked.append((target.name, len(lacking), has_checks))
        found = tuple(CellReport(cell.engine, 2, "safe", variant=cell.variant) for cell in lacking)
        checks = (Check("resume", True),) if has_checks else ()
        return TargetReport(target.name, "matrix", cells=found, checks=checks)


RECORDED: list[tuple[str, int, bool]] = []


def test_only_what_an_entry_lacks_or_an_older_audit_measured_is_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(measure, "Session", Recorded)
    monkeypatch.setattr(measure, "core", lambda: "new")
    RECORDED.clear()
    known = {"pkg.A": Entry("pkg.A", core="old", cells={"ddp": "wrong"}, passed=3)}
    labels = ["single", "ddp"]

    def run(**options: Any) -> dict[str, str]:
        return measure.measure(known, lambda: None, lambda *_: None, packages=["pkg", "gone"], **options)

    assert run(labels=labels[:1]) == {"gone": "cannot be imported"}
    assert known["pkg.A"].cells == {"single": "safe"}
    assert (known["pkg.A"].core, known["pkg.A"].passed) == ("new", 1)
    assert known["pkg.B"].error == "needs a closure"
    run(labels=labels)
    run(labels=labels)
    assert RECORDED == [("pkg.A", 1, True), ("pkg.A", 1, False)]


def test_entries_of_an_earlier_audit_hold_unless_the_change_may_alter_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    earlier = entries.EarlierAudit("saw less", "not judged")
    monkeypatch.setattr(entries, "EARLIER", {"old": earlier})
    monkeypatch.setattr(page, "EARLIER", {"old": earlier})
    plain, unsure = Entry("pkg.A", core="old"), Entry("pkg.B", core="old")
    plain.take(report())
    unsure.take(report())
    unsure.reasons["refused: not judged, because nothing is shown"] = ["ddp"]
    assert plain.holds("old")
    assert plain.holds("new")
    assert not unsure.holds("new")
    assert not Entry("pkg.C", core="older").holds("new")
    assert not Entry("pkg.D").holds("new")
    text = page.text([plain])
    assert "digest `old` measured every row. The audit whose sources have the digest `old` saw less." in text


def test_digest_of_the_audit_changes_with_its_sources(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = Path(measure.cells.__file__).parent
    for file in home.glob("*.py"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    before = measure.core()
    monkeypatch.setattr(measure.cells, "__file__", str(tmp_path / "cells.py"))
    assert measure.core() == before
    (tmp_path / "pages.py").write_text("# shows results only")
    assert measure.core() == before
    (tmp_path / "checks_state.py").write_text("# another check")
    assert measure.core() != before


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
