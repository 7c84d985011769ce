"""How a run ended, told from its folder, which only the holder of its lock may edit."""

from __future__ import annotations

import json
import os
import pickle
import signal
import time
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import pytest

from harness.config import compose
from harness.errors import InputError
from harness.jobs import outcome, train_command
from harness.preparation import prepare
from harness.record import folder as run_folder
from harness.record import readers
from harness.record.folder import REQUEUE, RunFolder
from tests.harness import warm
from tests.harness.running import small, write_documents

IDENTITY = "0123456789ab"


@pytest.fixture
def live(tmp_path: Path) -> Iterator[RunFolder]:
    """A run that this process trains."""
    folder = RunFolder(tmp_path / "group" / "run", compose.load(["steps=10"]), IDENTITY)
    folder.set_state("running", step=3)
    yield folder
    folder.close()


@pytest.mark.parametrize("asked", [None, signal.SIGINT, signal.SIGTERM])
def test_a_second_start_never_edits_the_run_of_another_process(
    asked: signal.Signals | None, live: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outcome, "LOCK_S", 0.05)
    before = {path.name: path.read_bytes() for path in live.path.iterdir()}
    ended = outcome.finalize(live.path, 1, {0: ""}, asked)
    assert {path.name: path.read_bytes() for path in live.path.iterdir()} == before
    assert "another process is training this run" in ended.reason
    assert (ended.state, ended.exit_code) == (("failed", 3) if asked is None else ("interrupted", 75))


def test_control_the_status_of_a_dead_run_is_completed(live: RunFolder) -> None:
    live.close()
    ended = outcome.finalize(live.path, 1, {}, signal.SIGINT)
    status = json.loads((live.path / "status.json").read_text())
    assert ended.state == status["state"] == status["attempts"][-1]["state"] == "interrupted"
    assert (
        ended.reason == status["attempts"][-1]["reason"] == "stopped at once by Ctrl-C (SIGINT) after step 3"
    )
    assert (live.path / REQUEUE).read_text() == "3\n"
    assert status["identity"] == IDENTITY


def test_a_run_killed_after_its_mark_of_the_end_is_finished(live: RunFolder) -> None:
    live.close()
    (live.path / "DONE").touch()
    assert outcome.finalize(live.path, -9, {0: ""}, None).exit_code == 0
    assert json.loads((live.path / "status.json").read_text())["state"] == "finished"


def test_a_status_that_cannot_be_written_is_told_all_the_same(
    live: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is full: as root, no permission stops a test from writing."""
    live.close()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(outcome.atomic, "write_json", full)
    assert outcome.finalize(live.path, 1, {}, signal.SIGTERM).exit_code == 75


def test_what_an_earlier_attempt_left_is_not_taken_for_this_one(
    live: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    """Processes that died before they opened the folder: else a crash at start reads as "interrupted", 75."""
    live.set_state("interrupted", step=3, reason="stopped by SIGTERM after step 3")
    live.close()
    before = (live.path / "status.json").read_bytes()
    ended = outcome.finalize(live.path, 1, {}, None, began=time.time() + 60)
    assert (ended.state, ended.exit_code) == ("failed", 3)
    assert "before the first step" in ended.reason
    assert outcome.main([str(live.path), "1", f"began={time.time() + 60:.0f}"]) == 3
    assert outcome.main([str(live.path), "1", "SIGUSR1", f"began={time.time() + 60:.0f}"]) == 75
    # Negative control: it is this attempt's own.
    assert outcome.main([str(live.path), "1", f"began={time.time() - 60:.0f}"]) == 75
    assert (live.path / "status.json").read_bytes() == before
    assert capsys.readouterr().out.splitlines()[-1] == "interrupted: stopped by SIGTERM after step 3"


@pytest.mark.parametrize(
    "text",
    ["", "[]", '{"attempts": 3}', '{"state": "running", "attempts": [7]}', '{"attempts": []}', "[" * 10000],
)
def test_a_damaged_status_is_no_traceback(text: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "status.json").write_text(text)
    ended = outcome.finalize(run, 1, {}, None)
    assert (ended.state, ended.exit_code) == ("failed", 3)


@pytest.mark.launch
def test_a_start_while_the_run_is_trained_is_bad_input_in_one_line(tmp_path: Path) -> None:
    """Through a real process, whose error holds a path."""
    words = small(write_documents(tmp_path, 40), tmp_path, "name=run")
    config = compose.load(words)
    live = RunFolder(tmp_path / "default" / "run", config, IDENTITY)
    live.close()
    identity = prepare(words, say=lambda text: None, writes_folder=False).identity
    run_folder.archive(live.path)
    live = RunFolder(tmp_path / "default" / "run", config, identity)
    before = {path.name: path.read_bytes() for path in live.path.iterdir()}
    done = warm.run("train", *words, timeout=120)
    assert done.returncode == 2, done.stderr
    assert "is being written to by another run" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert {path.name: path.read_bytes() for path in live.path.iterdir()} == before
    with pytest.raises(InputError, match="is being written to by another run"):
        run_folder.archive(live.path)
    live.close()


class _Odd:
    def __str__(self) -> str:
        return "an odd object"


@pytest.mark.parametrize(
    "value", [Path("/a/b"), PurePosixPath("c"), _Odd(), {1: Path("d")}, b"x", 1 + 2j, 3, None, "e"]
)
def test_an_error_crosses_processes_whatever_it_holds(value: object) -> None:
    error = InputError(
        "name",
        value,
        allowed=[Path("f"), "g"],  # pyright: ignore[reportArgumentType]
        fix=Path("h"),  # pyright: ignore[reportArgumentType]
    )
    error.add_note("a note is not an argument")
    assert str(InputError(**json.loads(json.dumps(error.fields())))) == str(error)
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
    assert str(value) in str(error)


def test_the_command_that_resumes_is_the_one_that_was_typed() -> None:
    words = ["optimizer=sumo", "data.files=[/a b/c.jsonl]", "name=x"]
    config = compose.load(["optimizer=sumo", "name=x"])
    assert (
        train_command.resume_command(words, config)
        == "optbench train optimizer=sumo 'data.files=[/a b/c.jsonl]' name=x"
    )
    config = compose.load(["overwrite=true", "resume=false"])
    assert (
        train_command.resume_command(["overwrite=true", "steps=3", "+resume=false"], config)
        == "optbench train steps=3"
    )
    assert (
        train_command.resume_command(["mine.yaml"], config)
        == "optbench train mine.yaml overwrite=false resume=true"
    )


def test_an_abort_of_nccls_watchdog_is_named_with_what_it_left(live: RunFolder) -> None:
    """Rank 1 aborted; the flight recorder wrote in this attempt, and in an earlier one."""
    stacks = "Fatal Python error: Aborted\n\nThread 0x1 (most recent call first):\n"
    dumps = live.path / "flight_recorder"
    dumps.mkdir()
    (dumps / "rank_0").write_text("old")
    os.utime(dumps / "rank_0", (1.0, 1.0))
    (dumps / "rank_1").write_text("new")
    began = time.time() - 60
    live.close()
    ended = outcome.finalize(live.path, 1, {0: stacks, 1: stacks}, None, began)
    assert (ended.state, ended.exit_code) == ("failed", 3)
    assert ended.reason.startswith("ranks 0, 1 crashed in native code (Aborted) after step")
    assert "the last collectives of 1 process(es) in flight_recorder/ (torchfrtrace" in ended.reason
    assert json.loads((live.path / "status.json").read_text())["attempts"][-1]["reason"] == ended.reason
    assert (live.path / "crash" / "rank_1.txt").read_text() == stacks


def test_stacks_are_kept_where_rank_0_has_said_who_was_silent(live: RunFolder) -> None:
    live.end("failed", step=3, reason=f"rank 1 {readers.SILENT}")
    live.close()
    ended = outcome.finalize(live.path, 1, {1: "the stacks"}, None, time.time() - 60)
    assert ended.reason == f"rank 1 {readers.SILENT}"
    assert (live.path / "crash" / "rank_1.txt").read_text() == "the stacks"
