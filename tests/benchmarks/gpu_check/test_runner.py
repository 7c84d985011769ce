"""A stage that crashes, hangs or fails costs itself only; started again, the check goes on where it stopped."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.gpu_check import __main__ as command
from benchmarks.gpu_check import page, runner
from benchmarks.gpu_check.record import Document, StageRecord
from benchmarks.gpu_check.runner import Session, Stage

_MODULE = "tests.benchmarks.gpu_check.faulty"


def stage(name: str, limit_s: float = 60) -> Stage:
    return Stage(name, name.capitalize(), f"{_MODULE}:{name}", limit_s)


def session(out: Path, **options: object) -> Session:
    return Session(out, "cpu", quick=True, say=lambda line: None, **options)  # type: ignore[arg-type]


def record(out: Path, name: str) -> StageRecord:
    loaded = StageRecord.load(out / "stages" / f"{name}.json")
    assert loaded is not None
    return loaded


def test_every_stage_leaves_its_result_whatever_happens_to_the_others(tmp_path: Path) -> None:
    stages = [stage("crashing"), stage("hanging", 10), stage("raising"), stage("failing"), stage("good")]
    runner.run(stages, session(tmp_path))
    assert record(tmp_path, "crashing").status == "crashed"
    assert "SIGSEGV" in record(tmp_path, "crashing").reason
    hanging = record(tmp_path, "hanging")
    assert hanging.status == "timed out"
    # The dump names the function in which it hung.
    assert "faulty.py" in hanging.reason
    assert "outside of an attempt" in record(tmp_path, "raising").reason
    for name in ("crashing", "hanging", "raising"):
        assert [check.status for check in record(tmp_path, name).checks] == ["passed", "failed"]
    failing = record(tmp_path, "failing")
    assert failing.status == "done"
    assert [check.status for check in failing.checks] == ["failed", "failed", "not run"]
    assert failing.checks[1].reason == "ValueError: one"
    assert record(tmp_path, "good").status == "done"
    document = page.collect(stages, session(tmp_path))
    assert (document.passed, document.failed, document.not_run) == (4, 5, 1)
    assert not (tmp_path / "scratch" / "good").exists()


def test_a_second_start_goes_on_where_the_first_one_stopped(tmp_path: Path) -> None:
    lines: list[str] = []
    stages = [stage("good"), stage("failing")]
    first = Session(tmp_path, "cpu", quick=True, say=lines.append)
    runner.run(stages[:1], first)
    begun = record(tmp_path, "good").model_copy(update={"status": "running", "name": "failing"})
    # As it is after the watcher was killed together with a stage.
    begun.save(tmp_path / "stages" / "failing.json")
    runner.run(stages, first)
    assert [line.partition(",")[0] for line in lines] == ["good: done", "good: kept (done", "failing: done"]
    runner.run(stages, Session(tmp_path, "cpu", quick=True, again=True, say=lines.append))
    assert [line.partition(",")[0] for line in lines[3:]] == ["good: done", "failing: done"]


def test_results_of_other_sources_or_another_device_are_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner.run([stage("good")], session(tmp_path))
    full = Session(tmp_path, "cpu", quick=False)
    assert page.collect([stage("good")], full).stages[0].status == "not run"
    monkeypatch.setattr(runner, "sources_sha256", lambda: "f" * 64)
    assert page.collect([stage("good")], session(tmp_path)).stages[0].status == "not run"


def test_a_spent_budget_leaves_the_other_stages_not_run(tmp_path: Path) -> None:
    runner.run([stage("good")], session(tmp_path, budget_s=0.0))
    assert record(tmp_path, "good").status == "not run"
    assert "start again" in record(tmp_path, "good").reason
    # A stage that was not run is run by the next start.
    runner.run([stage("good")], session(tmp_path))
    assert record(tmp_path, "good").status == "done"


def test_the_command_writes_both_outputs_and_its_exit_code_tells_a_failed_check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    docs = tmp_path / "gpu.md"
    docs.write_text(f"# GPUs\n\n{page.BEGIN}\nold\n{page.END}\n\nLast words.\n")
    words = ["--device", "cpu", "--quick", "--out", str(tmp_path / "out"), "--docs", str(docs)]
    monkeypatch.setattr(command, "STAGES", (stage("good"), stage("failing")))
    # Without a result of every stage nothing is proven: start again.
    assert command.main([*words, "--stages", "good", "--minutes", "0"]) == 75
    capsys.readouterr()
    assert command.main([*words, "--stages", "good", "--json"]) == 0
    document = Document.model_validate_json(capsys.readouterr().out)
    assert [entry.status for entry in document.stages] == ["done", "not run"]
    assert command.main(words) == 1
    stored = json.loads((tmp_path / "out" / "gpu_check.json").read_text())
    assert Document.model_validate(stored).failed == 2
    assert stored["stages"][0]["checks"][0]["figures"] == {"ms": 1.235, "name": "a|b", "bad": "nan"}
    text = docs.read_text()
    assert "old" not in text
    assert text.startswith("# GPUs")
    assert text.endswith("Last words.\n")
    assert "### Good" in text
    assert "name a\\|b" in text
    assert "| third | It is fast. | not run: needs CUDA |" in text


def test_a_promised_page_that_cannot_be_written_makes_the_command_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "STAGES", (stage("good"),))
    out = tmp_path / "out"
    (out / page.PAGE_NAME).mkdir(parents=True)
    words = ["--device", "cpu", "--quick", "--out", str(out)]
    assert command.main(words) == 1
    assert page.PAGE_NAME in capsys.readouterr().err
    (out / page.PAGE_NAME).rmdir()
    docs = tmp_path / "gpu.md"
    docs.write_text("no markers")
    assert command.main([*words, "--docs", str(docs)]) == 2
    assert "has no place for the tables" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "part"),
    [(["--stages", "polarr", "--device", "cpu"], "polar"), (["--device", "cuda"], "--device cpu --quick")],
)
def test_bad_input_is_one_line(
    words: list[str], part: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert command.main(words) == 2
    error = capsys.readouterr().err
    assert part in error
    assert len(error.splitlines()) == 1
