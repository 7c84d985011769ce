"""What compare and sweep print while they train: one line for the whole, and what each run printed where it belongs."""

from __future__ import annotations

import io
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from analysis.compare import arguments, command, progress, sessions
from analysis.compare.progress import SessionProgress, Verbosity
from analysis.pages import screenshot
from analysis.tuning import arguments as tuning_arguments
from analysis.tuning import command as tuning_command
from harness.errors import InputError
from harness.files import atomic
from harness.jobs import launch
from harness.jobs.outcome import RunOutcome
from harness.preparation import Prepared
from tests.analysis.stand_in import SMALL, Launcher


class Talkative(Launcher):
    """A stand-in whose processes print."""

    outputs: list[Any]

    def start(self, run: Prepared, *, output: Any = None) -> RunOutcome:
        self.outputs = [*getattr(self, "outputs", []), output]
        if output is not None and "b" in getattr(output, "mode", ""):
            output.write(f"banner of {run.folder.name}, password=hunter2secret\n".encode())
        return super().start(run, output=output)


@pytest.fixture
def launcher(monkeypatch: pytest.MonkeyPatch) -> Talkative:
    fake = Talkative()
    monkeypatch.setattr(launch, "start", fake.start)
    monkeypatch.setattr(screenshot, "browser", lambda: None)
    return fake


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    return ["adamw", "sumo", "seeds=2", "group=g", f"runs_dir={tmp_path / 'runs'}", *SMALL]


def test_a_log_file_gets_one_line_for_each_run(
    launcher: Talkative, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    launcher.fate = {"sumo-seed0": "diverged"}
    assert command.main(words) == 3
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("[")]
    assert [line.split()[:2] for line in lines] == [
        ["[1/4]", "adamw-seed0:"],
        ["[2/4]", "sumo-seed0:"],
        ["[3/4]", "adamw-seed1:"],
        ["[4/4]", "sumo-seed1:"],
    ]
    assert "finished in" in lines[0]
    assert "validation loss" in lines[0]
    assert "left" in lines[0]
    assert "diverged in" in lines[1]
    assert "left" not in lines[-1]


@pytest.mark.parametrize("flag", ["-q", "--quiet"])
def test_quiet_names_only_runs_that_did_not_finish(
    flag: str, launcher: Talkative, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    launcher.fate = {"sumo-seed0": "diverged"}
    assert command.main([*words, flag]) == 3
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("[")] == [
        next(line for line in lines if line.startswith("[2/4] sumo-seed0: diverged"))
    ]
    assert lines[-1] == str(tmp_path / "runs" / "g" / "report.html")


@pytest.mark.parametrize(("flags", "is_shown"), [([], False), (["-v"], True), (["--verbose"], True)])
def test_what_runs_print_is_shown_on_demand(
    flags: list[str], is_shown: bool, launcher: Talkative, words: list[str]
) -> None:
    assert command.main([*words, *flags]) == 0
    assert len(launcher.outputs) == 4
    assert all((output is None) == is_shown for output in launcher.outputs)


def test_what_a_failed_run_printed_is_in_its_log(
    launcher: Talkative, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    launcher.fate = {"sumo-seed0": "failed"}
    assert command.main(words) == 3
    group = tmp_path / "runs" / "g"
    log = (group / "sumo-seed0" / "log.txt").read_text()
    assert "banner of sumo-seed0" in log
    assert "adamw" not in log
    assert "hunter2secret" not in log
    assert str(group / "sumo-seed0" / "log.txt") in capsys.readouterr().out
    others = (
        (group / "adamw-seed0" / "log.txt").read_text() if (group / "adamw-seed0/log.txt").exists() else ""
    )
    assert "banner" not in others


def test_the_live_line_follows_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    buffer = io.StringIO()
    terminal = partial(Console, file=buffer, force_terminal=True, width=100, highlight=False)
    monkeypatch.setattr(progress, "Console", lambda **_: terminal())
    monkeypatch.setattr(progress, "POLL_S", 0.02)
    folder = tmp_path / "sumo-seed0"
    folder.mkdir()
    with SessionProgress(300, 2, verbosity=Verbosity.NORMAL, to_stderr=False) as line:
        line.begin(1, folder, 150)
        atomic.write_json(folder / "status.json", {"state": "running", "step": 40, "steps": 150})
        end = time.monotonic() + 20
        while "step 40/150" not in buffer.getvalue() and time.monotonic() < end:
            time.sleep(0.02)
        line.end(1, "finished in 3 s", is_finished=True)
    shown = buffer.getvalue()
    assert "[1/2] sumo-seed0" in shown
    assert "step 40/150, about" in shown
    assert "[1/2] sumo-seed0: finished in 3 s; about" in shown


@pytest.mark.parametrize("read", [arguments.plan, tuning_arguments.read], ids=["compare", "sweep"])
def test_quiet_and_verbose_contradict_each_other(read: Any) -> None:
    flags = {
        "-q": Verbosity.QUIET,
        "--quiet": Verbosity.QUIET,
        "-v": Verbosity.VERBOSE,
        "--verbose": Verbosity.VERBOSE,
    }
    for flag, verbosity in flags.items():
        study = read(["adamw", "sumo", flag])
        plan = getattr(study, "plan", study)
        assert plan.verbosity is verbosity
        assert flag not in plan.command
    with pytest.raises(InputError, match="contradict"):
        read(["adamw", "sumo", "-v", "--quiet"])
    with pytest.raises(InputError, match="--loud"):
        read(["adamw", "sumo", "--loud"])


@pytest.mark.parametrize("second", [command.main, tuning_command.main], ids=["compare", "sweep"])
def test_a_group_belongs_to_one_command_at_a_time(
    second: Any, launcher: Talkative, words: list[str], tmp_path: Path
) -> None:
    with sessions.lock_group(tmp_path / "runs" / "g"):
        with pytest.raises(InputError, match="by another compare or sweep"):
            second(words)
        assert launcher.started == []
        assert second([word.replace("group=g", "group=h") for word in words if "seeds" not in word]) == 0
    launcher.started.clear()
    assert second(words) == 0
    assert launcher.started
