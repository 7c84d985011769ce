"""`optbench audit`: exit codes, the document, and targets that crash, print, or never return."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from harness import cli
from harness.verify.audit import cells, command, table, tables
from harness.verify.audit.controls import CONTROLS
from harness.verify.audit.document import CellReport, Check, TargetReport
from harness.verify.audit.session import Session
from harness.verify.audit.targets import Target, TargetError
from harness.verify.pool import RankLost

ROOT = Path(__file__).parents[4]
RULES = Path(__file__).with_name("rules.py")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no target is nothing to audit"),
        (["NoSuchPreset"], "is neither a preset nor an import path"),
        (["torch.optim.AdamW", "--engine", "fsdp3"], "did you mean fsdp2?"),
        (["torch.optim.AdamW", "--kwargs", "lr"], "cannot be read"),
        (["torch.optim.AdamW", "--time-limit", "never"], "seconds above 0"),
        (["torch.optim.AdamW", "--out", "/proc/nothing"], "cannot be written"),
    ],
)
def test_bad_input_is_found_before_a_process_starts(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["audit", *arguments, "--json"]) == 2
    captured = capsys.readouterr()
    assert message in captured.err.splitlines()[-1]
    assert message in json.loads(captured.out)["error"]["message"]


def test_the_command_imports_no_torch() -> None:
    code = "import sys, harness.verify.audit.command; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)


def test_tables_show_the_worst_verdict_of_an_engine() -> None:
    found = (
        CellReport("fsdp2", 2, "safe"),
        CellReport("fsdp2", 2, "wrong", 0.9, 1, "q|k.weight", "slices", variant="uneven"),
    )
    report = TargetReport("a.B", "matrix", cells=found, checks=(Check("resume", False, "differs"),))
    text = table.markdown([report])
    assert "| a.B | matrix |  |  | wrong (uneven) |" in text
    assert "- a.B on fsdp2 uneven: wrong, slices" in text
    assert "- a.B, resume: differs" in text
    assert str(table.line(report, 1, 2)).startswith("[1/2] a.B: matrix; 1 wrong, 1 safe")


def test_ci_appends_a_table_to_the_job_summary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    summary = tmp_path / "summary.md"
    summary.write_text("before\n")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary))
    command._summarize([TargetReport("a.B", "matrix", cells=(CellReport("ddp", 2, "safe"),))])
    assert summary.read_text().startswith("before\n| optimizer | class |")
    assert "| a.B | matrix |  | safe |" in summary.read_text()


def test_after_the_deadline_nothing_runs_passes_or_counts_as_a_crash(tmp_path: Path) -> None:
    with Session(tmp_path, deadline=0.0) as session:
        report = session.audit(Target("torch.optim.SGD"), cells.select(["single", "ddp"])[:2])
        control = session.controls(CONTROLS[:1])[0]
    assert report.cells == report.checks == ()
    assert report.not_run == ("single", "ddp", "checks")
    assert not report.passed
    assert not report.failed
    assert report.as_dict()["not_run"] == ["single", "ddp", "checks"]
    assert not control.passed


def test_what_was_not_run_is_said_with_what_to_type(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    done = TargetReport("a.B", "matrix", cells=(CellReport("ddp", 2, "safe"),))
    cut = TargetReport(
        "a.C", "matrix", cells=done.cells, not_run=("fsdp2 uneven", "zero3", "zero3 bf16", "checks")
    )
    reports = {"a.B": done, "a.C": cut}
    monkeypatch.setattr(Session, "probe", lambda _self, target: target)
    monkeypatch.setattr(Session, "audit", lambda _self, target, _cells: reports[target.name])
    assert cli.main(["audit", "a.B", "--ci"]) == 0
    assert "not run" not in capsys.readouterr().err
    assert cli.main(["audit", "a.B", "a.C", "--ci"]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(
        "a.C: not run, because the time of --ci was over: fsdp2 uneven, zero3, zero3 bf16, checks."
    )
    assert last.endswith("optbench audit 'a.C' --engine fsdp2,zero3")
    assert "crashes" not in table.markdown([cut])
    assert tables.counts([done, cut]) == {"passed": 1, "failed": 0, "not finished": 1, "not audited": 0}
    assert "4 not run" in tables.badge(cut)
    assert "4 not run" in str(table.line(cut, 1, 2))


def test_ci_begins_nothing_that_would_end_after_its_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    deadlines: list[float | None] = []

    def audit(session: Session, target: Target, _cells: object) -> TargetReport:
        deadlines.append(session._deadline)
        return TargetReport(target.label, "matrix", cells=(CellReport("ddp", 2, "safe"),))

    monkeypatch.setattr(Session, "probe", lambda _self, target: target)
    monkeypatch.setattr(Session, "audit", audit)
    monkeypatch.setattr(command.time, "monotonic", lambda: 1000.0)
    assert cli.main(["audit", "a.B", "--ci"]) == 0
    assert cli.main(["audit", "a.B"]) == 0
    assert deadlines == [1000.0 + command.CI_S - command.CI_CELL_S, None]


class Pool:
    """Answers in the place of ranks."""

    def __init__(self, first: object) -> None:
        self.first = first

    def run(self, function: str, *arguments: Any, what: str, timeout_s: float) -> list[object]:
        if function.endswith(":first_step"):
            return [self.first]
        if what == "slow":
            raise RankLost(f"rank 0 of 1 gave no answer within {timeout_s:g} s in {what}")
        return [Check(what, True)]


def test_a_check_that_hangs_costs_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Session, "pool", lambda _self, _ranks: Pool(["quick", "slow", "last"]))
    found, missing = Session(tmp_path)._checks(Target("a.B"))
    resume = "resume at another world size"
    assert [(check.name, check.passed) for check in found] == [
        ("quick", True),
        ("slow", False),
        ("last", True),
        (resume, True),
    ]
    assert (found[1].detail, missing) == ("gives no answer (rank 0 of 1 gave no answer within 60 s)", "")


def test_checks_that_a_deadline_cuts_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Session, "pool", lambda _self, _ranks: Pool(["quick", "last"]))
    late = iter([False, False, True])
    monkeypatch.setattr(Session, "is_late", property(lambda _self: next(late)))
    found, missing = Session(tmp_path)._checks(Target("a.B"))
    assert ([check.name for check in found], missing) == (["quick"], "checks from last on")


def test_a_first_step_without_end_is_neither_passed_nor_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = Check("first step", None, "the first step did not end within 45 s")
    monkeypatch.setattr(Session, "pool", lambda _self, _ranks: Pool(slow))
    found, missing = Session(tmp_path)._checks(Target("a.B"))
    report = TargetReport("a.B", "matrix", checks=tuple(found), not_run=(missing,))
    assert found == [slow]
    assert not report.passed
    assert not report.failed
    assert table.not_run(report) == (
        "a.B: not run, because the first step did not end within 45 s: checks. This says nothing about the optimizer. "
        "With more time: optbench audit 'a.B' --time-limit 600"
    )


def test_a_package_without_an_auditable_optimizer_does_not_pass(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def probe(_self: Session, _target: Target) -> Target:
        raise TargetError("needs a closure")

    monkeypatch.setattr(Session, "members", lambda _self, package: [Target(f"{package}.LBFGS")])
    monkeypatch.setattr(Session, "probe", probe)
    assert cli.main(["audit", "--all", "pkg", "--json"]) == 1
    captured = capsys.readouterr()
    assert json.loads(captured.out)["passed"] is False
    assert "nothing was audited: pkg has no optimizer" in captured.err


def audit(folder: Path, *arguments: str) -> tuple[int, dict[str, Any], str]:
    """Run the command in a folder of the user's that holds rules.py."""
    (folder / "rules.py").write_text(RULES.read_text())
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "harness.cli", "audit", *arguments, "--json"],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
    )
    return done.returncode, json.loads(done.stdout), done.stderr


@pytest.mark.slow
def test_what_prints_hangs_or_dies_ends_its_own_cell_only(tmp_path: Path) -> None:
    code, document, _ = audit(
        tmp_path,
        *("rules.Printing", "rules.Hanging", "rules.Dying", "torch.optim.SGD"),
        *("--engine", "single,ddp", "--time-limit", "20", "--out", "found"),
    )
    assert code == 1
    assert document["schema_version"] == 1
    assert document == json.loads((tmp_path / "found" / "audit.json").read_text())
    printing, hanging, dying, sgd = document["targets"]
    assert {cell["verdict"] for cell in (*printing["cells"], *sgd["cells"])} == {"safe"}
    for target, reason in ((hanging, "gives no answer"), (dying, "exit code 9")):
        verdicts = {cell["engine"]: cell for cell in target["cells"]}
        assert verdicts["single"]["verdict"] == "safe"
        assert verdicts["ddp"]["verdict"] == "crashes"
        assert reason in verdicts["ddp"]["reason"]


@pytest.mark.slow
def test_ranks_leave_no_semaphore_behind() -> None:
    code = """
import harness.verify.audit.preload
from multiprocessing import synchronize
from tqdm import tqdm
synchronize.SemLock.__init__ = None
assert list(tqdm(range(2))) == [0, 1]
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=120)


@pytest.mark.slow
def test_a_target_that_dies_on_import_is_bad_input(tmp_path: Path) -> None:
    (tmp_path / "dies.py").write_text("import os; os._exit(5)")
    code, document, err = audit(tmp_path, "dies.Thing", "--engine", "single")
    assert code == 2
    assert "ends the process (rank 0 of 1 died (exit code 5)" in document["error"]["message"]
    assert err.strip().splitlines()[-1] == document["error"]["message"]
