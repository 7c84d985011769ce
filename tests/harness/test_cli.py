"""The command line: lazy, one line for bad input, exit codes, JSON."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from harness import cli
from harness.commands import COMMANDS, HEADINGS, Command
from harness.errors import InputError
from harness.output import json_document

ROOT = Path(__file__).resolve().parents[2]


def optbench(*words: str, folder: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """The program as a user starts it, in a process of its own."""
    script = Path(sys.executable).with_name("optbench")
    start = [str(script)] if script.exists() else [sys.executable, "-m", "harness.cli"]
    environ = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*start, *words], capture_output=True, text=True, timeout=120, cwd=folder, env=environ, check=False
    )


def test_help_is_instant_because_it_imports_nothing() -> None:
    probe = (
        "import sys; from harness.cli import main; code = main(['--help']);"
        "heavy = {'torch', 'pydantic', 'hydra', 'omegaconf', 'rich', 'yaml', 'numpy', 'transformers'};"
        "print(code, sorted(heavy & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", probe], capture_output=True, text=True, cwd=ROOT, timeout=60, check=True
    )
    assert result.stdout.splitlines()[-1] == "0 []"
    assert "usage: optbench COMMAND" in result.stdout


def test_nothing_here_imports_torch() -> None:
    words = ("list", "show sumo", "train --help", "show llama_7b", "lst", "show sumoo", "train steps=abc")
    probe = (
        "import sys; from harness.cli import main; codes = [main(line.split()) for line in sys.argv[1:]];"
        "print(codes, sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", probe, *words],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=60,
        check=False,
    )
    assert result.stdout.splitlines()[-1] == "[0, 0, 0, 0, 2, 2, 2] []", result.stderr


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"], ["help"]])
def test_overview_lists_every_command(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(words) == 0
    text = capsys.readouterr().out
    assert all(f"  {name}" in text and command.summary in text for name, command in COMMANDS.items())


@pytest.mark.parametrize("columns", [40, 80, 200])
@pytest.mark.parametrize("words", [["--help"], ["train", "--help"], ["margin", "--help"], ["sweep", "-h"]])
def test_help_fits_the_terminal(
    columns: int, words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    assert cli.main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    # A word that is longer than the terminal (a key with its default) is not broken.
    too_long = [line for line in lines if len(line) > columns and " " in line.strip()]
    assert too_long == []
    assert max(map(len, lines)) > min(columns, 80) / 2


def test_help_is_grouped_and_names_each_command_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 0
    text = capsys.readouterr().out
    for name in COMMANDS:
        assert len([line for line in text.splitlines() if line.startswith(f"  {name} ")]) == 1
    named = [name for names in HEADINGS.values() for name in names]
    assert len(named) == len(set(named))
    # At 80 columns each command has one line.
    assert max(len(command.summary) for command in COMMANDS.values()) <= 65


@pytest.mark.parametrize(
    "words", [["--help", "show"], ["help", "show"], ["show", "sumo", "--help"], ["--json", "--help", "show"]]
)
def test_help_may_be_anywhere(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(words) == 0
    assert "usage: optbench show" in capsys.readouterr().out


def test_json_may_come_first(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--json", "show", "sumo"]) == 0
    assert json.loads(capsys.readouterr().out)["name"] == "sumo"


@pytest.mark.parametrize("columns", [40, 80])
@pytest.mark.parametrize("words", [["list"], ["show", "train"], ["show", "sumo"]])
def test_tables_of_a_narrow_terminal_lose_nothing(
    columns: int, words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def shown(width: int) -> str:
        monkeypatch.setenv("COLUMNS", str(width))
        assert cli.main(words) == 0
        return capsys.readouterr().out

    narrow, wide = shown(columns), shown(400)
    assert max(len(line) for line in narrow.splitlines()) <= columns
    # rich writes this letter where it cuts a cell off.
    assert narrow.count("…") == wide.count("…")


@pytest.mark.parametrize("name", list(COMMANDS))
def test_help_of_a_command(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([name, "--help"]) == 0
    text = capsys.readouterr().out
    assert f"usage: optbench {name}" in text
    assert "examples:" in text
    assert "--json" in text
    assert ("optimizer.lr=" in text) == COMMANDS[name].takes_keys


def test_examples_of_runs_compose() -> None:
    from harness.config.compose import load

    for words, _ in COMMANDS["train"].examples:
        composed = load(words.split())
        for word in words.split():
            key, _, value = word.partition("=")
            if key in ("steps", "world_size", "batch_size", "precision"):
                assert str(getattr(composed, key)) == value


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["lst"], "command: lst is not a command; did you mean list?"),
        (["steps=5"], "command: steps=5 is not a command; did you mean train steps=5?"),
        (["--steps"], "command: --steps is not a command"),
        (["list", "all"], "list: all is not expected"),
        (["show"], "show: no name is not one name"),
        (["show", "sumoo"], "show: sumoo is not known; did you mean sumo?"),
        (["show", "sumo", "galore"], "show: sumo galore is not one name"),
    ],
)
def test_bad_input_is_the_last_line(words: list[str], line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(words) == 2
    output = capsys.readouterr()
    assert output.out == ""
    last = output.err.splitlines()[-1]
    assert last.startswith(line)
    assert "Traceback" not in output.err
    assert "fix: " in last


def fake(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def fail(command: Command, words: Sequence[str]) -> int:
        raise error

    monkeypatch.setattr(cli, "_run", fail)


def test_the_line_is_exactly_the_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    error = InputError("steps", "abc", allowed="a whole number", fix="steps=5")
    fake(monkeypatch, error)
    assert cli.main(["train"]) == 2
    assert capsys.readouterr().err == f"{error}\n"


def test_bad_input_with_json_is_still_one_document(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    error = InputError("steps", "abc")
    fake(monkeypatch, error)
    assert cli.main(["train", "--json"]) == 2
    document = json.loads(capsys.readouterr().out)
    assert document["schema_version"] == 1
    assert document["error"] == {"key": "steps", "value": "abc", "message": str(error)}


def test_a_failure_keeps_its_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake(monkeypatch, RuntimeError("boom"))
    assert cli.main(["train"]) == 3
    assert "Traceback" in capsys.readouterr().err


def test_an_interrupt_without_a_resumable_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake(monkeypatch, KeyboardInterrupt())
    assert cli.main(["train"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_a_reader_that_leaves_is_no_error() -> None:
    command = f"{sys.executable} -m harness.cli train --help | head -1; exit ${{PIPESTATUS[0]}}"
    result = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, cwd=ROOT, timeout=60, check=False
    )
    assert result.returncode == 0
    assert result.stderr == ""


def test_numbers_that_json_lacks_are_refused() -> None:
    with pytest.raises(ValueError, match="JSON"):
        json_document(loss=float("nan"))


PROGRAM = [
    (["train", "optimizer=sumoo"], "optimizer: sumoo is wrong; did you mean sumo?"),
    (["train", "sumo"], "sumo: is not an assignment; did you mean optimizer=sumo?"),
    (["train", "optimizer=sumo", "optimizer.rank=999"], "optimizer.rank: 999 is larger than a side of"),
]


@pytest.mark.parametrize(("words", "line"), PROGRAM, ids=[" ".join(words) for words, _ in PROGRAM])
def test_the_program_refuses_before_anything_is_written(words: list[str], line: str, tmp_path: Path) -> None:
    result = optbench(*words, folder=tmp_path)
    assert result.returncode == 2, result.stderr
    assert result.stderr.splitlines()[-1].startswith(line)
    assert "Traceback" not in result.stderr
    assert result.stdout == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "words",
    [
        ["paper", "sumo_table3", "--out", "{place}"],
        ["margin", "steps=10", "--out", "{place}"],
        ["certify", "rule=sumo", "--out", "{place}"],
    ],
    ids=lambda words: words[0],
)
@pytest.mark.parametrize("place", ["/proc/none", "{file}/below"])
def test_a_folder_that_cannot_be_written_is_found_first(
    words: list[str], place: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    place = place.format(file=tmp_path / "file")
    assert cli.main([word.format(place=place) for word in words]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith(f"--out: {place} cannot be written")
    assert len(printed.err.splitlines()) == 1
    assert printed.out == ""


@pytest.mark.parametrize(("arguments", "code"), [(["list", "--json"], 0), (["train", "stps=1", "--json"], 2)])
def test_a_closed_standard_output_changes_no_exit_code(arguments: list[str], code: int) -> None:
    command = [sys.executable, "-m", "harness.cli", *arguments]
    ended = subprocess.run(
        ["bash", "-c", '"$@" >&-', "bash", *command], capture_output=True, text=True, check=False
    )
    assert ended.returncode == code
    assert "Traceback" not in ended.stderr
