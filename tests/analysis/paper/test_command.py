"""`optbench paper` from its words to its exit code, documents and files."""

from __future__ import annotations

import csv
import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from analysis.paper import tables
from analysis.paper.cells import STATUSES
from analysis.paper.command import main
from harness import cli
from harness.config import checks, compose
from harness.errors import InputError

NAMES = [
    f"sumo_{name}" for name in ("gsm8k", "table1", "table2", "table3", "table6", "table7", "table8", "table9")
]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("words", [[], ["--list"]])
def test_the_list_of_tables(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in NAMES)
    assert main([*words, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["schema_version"] == 1
    assert [table["name"] for table in document["tables"]] == NAMES


def test_the_document_of_a_table(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sumo_table6", "--json"]) == 1
    document = json.loads(capsys.readouterr().out)
    assert document["schema_version"] == 1
    assert document["table"] == "sumo_table6"
    keys = {"row", "column", "published", "predicted", "measured", "status", "unit"}
    assert all(keys <= set(cell) for cell in document["cells"])
    assert {cell["status"] for cell in document["cells"]} <= set(STATUSES)
    by_place = {(cell["row"], cell["column"]): cell for cell in document["cells"]}
    assert by_place["AdamW", "350M memory"]["published"] == 1.37
    assert by_place["AdamW", "350M memory"]["unit"] == "GiB"
    assert by_place["AdamW", "350M memory"]["command"] is None
    assert by_place["AdamW", "350M perplexity"]["predicted"] is None


def test_the_exit_code_is_the_answer(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sumo_table9"]) == 0  # nothing can be predicted, nothing was run: nothing disagrees
    assert "24 not_run" in capsys.readouterr().out
    assert main(["sumo_table1"]) == 1  # a reason explains a difference and does not mend it
    printed = capsys.readouterr().out
    assert "differs_known" in printed
    assert "nr + 2mr; see the next row" in printed


PRETRAINING = {"sumo_table1": 0, "sumo_table3": 12, "sumo_table6": 4, "sumo_table9": 24}
FINE_TUNING = {"sumo_gsm8k": 6, "sumo_table2": 72, "sumo_table7": 8, "sumo_table8": 25}
"""Table → runs that would fill it."""


@pytest.mark.slow
@pytest.mark.parametrize("name", FINE_TUNING)
def test_every_printed_command_fine_tunes_a_model(
    name: str, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([name, "--commands"]) == 0
    lines = capsys.readouterr().out.splitlines()
    runs = [shlex.split(line) for line in lines if line and not line.startswith("#")]
    assert len({tuple(words) for words in runs}) == len(runs) == FINE_TUNING[name]
    for words in runs[::5]:
        (path,) = [word for word in words if word.startswith("model.path=")]
        with pytest.raises(InputError, match=r"model\.path: models/"):  # the reader's, not here
            checks.check(compose.load(words[2:]), environ={}, devices=0)
        random = [word for word in words[2:] if word != path] + ["model.path=null"]
        config = checks.check(compose.load(random), environ={}, devices=1)
        assert (config.task.name != "pretrain", config.group) == (True, name)


@pytest.mark.parametrize("name", PRETRAINING)
def test_every_printed_command_is_a_run(name: str, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name, "--commands"]) == 0
    lines = capsys.readouterr().out.splitlines()
    runs = [shlex.split(line) for line in lines if line and not line.startswith("#")]
    assert len(runs) == PRETRAINING[name]
    assert all(words[:2] == ["optbench", "train"] for words in runs)
    # Each has been composed when its cell was filled; every fourth goes through the shell's words again.
    for words in runs[::4]:
        composed = compose.load(words[2:])
        for devices in (1, 8):
            config = checks.check(composed, environ={}, devices=devices)
            assert config.world_size == devices
        assert config.batch_size == 512
        # One document a row, none twice: C4 has more than 256 T5 tokens in a document on average.
        assert (config.data.max_tokens or 0) >= config.steps * config.batch_size * 256
        assert config.group == name
    assert len({tuple(words) for words in runs}) == len(runs)


def test_commands_as_a_document(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sumo_table6", "--commands", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert [run["cells"] for run in document["commands"]] == [
        ["AdamW, 350M perplexity"],
        ["APOLLO, 350M perplexity"],
        ["APOLLO-Mini, 350M perplexity"],
        ["SUMO, 350M perplexity"],
    ]


def test_files(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sumo_table6", "--out", "written"]) == 1
    err = capsys.readouterr().err.split()
    assert err == [f"written/sumo_table6.{ending}" for ending in ("json", "md", "csv")]
    rows = list(csv.DictReader((home / "written/sumo_table6.csv").open()))
    document = json.loads((home / "written/sumo_table6.json").read_text())
    assert [row["status"] for row in rows] == [cell["status"] for cell in document["cells"]]
    assert (
        "| AdamW | 350M memory | 1.37 | 1.371 | – | GiB | agrees |"
        in (home / "written/sumo_table6.md").read_text()
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["sumo_tabel3"], "paper: sumo_tabel3 is not a table; did you mean sumo_table3?"),
        (["sumo_table3", "runs=nowhere"], "runs: nowhere is not a folder"),
        (["sumo_table3", "runs="], "runs: nothing is not a folder"),
        (["sumo_table3", "rnus=x"], "rnus: x is for an unknown key; allowed: runs; fix: runs=DIR"),
        (["sumo_table3", "--comands"], "paper: --comands is not an option; did you mean --commands?"),
        (["sumo_table3", "sumo_table9"], "paper: sumo_table3 sumo_table9 is not one table"),
        (["sumo_table3", "--out"], "--out: needs a value"),
        (["sumo_table3", "--out", "file"], "--out: file is a file; allowed: a folder"),
        (["--list", "sumo_table3"], "paper: sumo_table3 and the list of tables exclude each other"),
        (["--commands"], "paper: --commands and the list of tables exclude each other"),
    ],
)
def test_bad_words(words: list[str], message: str, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (home / "file").touch()
    assert cli.main(["paper", *words]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.splitlines()[-1].startswith(message)


GOOD = (
    "title: t\nsource: {paper: p, arxiv: '1', table: '1'}\nprovenance: {published: read}\n"
    "quantities: {memory: {kind: memory, unit: GiB}}\ncolumns: {60M: {words: [model=llama_60m], values: {rank: 8}}}\n"
    "rows:\n  SUMO:\n    words: [optimizer=sumo_paper, optimizer.rank=$rank]\n    published: {60M: {memory: '0.3'}}\n"
)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("title: t", "title: [", "is not YAML"),
        ("title: t", "titel: t", "title: in .* is wrong (Field required)"),
        ("'0.3'", "0.3", "valid string"),
        ("'0.3'", "'0.3G'", "not a decimal number as printed"),
        ("published: {60M", "published: {61M", "row SUMO has 61M, memory, which is not a column"),
        ("{memory: '0.3'}", "{perplexity: '0.3'}", "row SUMO has 60M, perplexity, which is not a column"),
        ("$rank", "$rnk", "row SUMO column 60M has no value rnk"),
        ("optimizer.rank", "optimizer.rnak", "row SUMO, column 60M of .*mine.yaml"),
        ("unit: GiB", "unit: KiB", "unit 'KiB' is not a unit of memory: GiB, MiB, GB, MB"),
        ("kind: memory", "kind: state_numbers", "the model has no parameter"),
        (
            "published: {60M",
            "formula: nr + mr\n    published: {60M",
            "needs published, or formula, and not both",
        ),
        (
            "words: [optimizer",
            "absent: x\n    words: [optimizer",
            "needs words, or absent with the reason, and not both",
        ),
        ("published: read", "published: guessed", "provenance.published"),
        (
            "words: [optimizer",
            "unstated: [optimizer.lrr]\n    words: [optimizer",
            "optimizer.lrr as unstated",
        ),
    ],
)
def test_a_wrong_table_is_named(
    old: str, new: str, message: str, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = home / "configs" / "paper"
    folder.mkdir(parents=True)
    (folder / "mine.yaml").write_text(GOOD)
    assert cli.main(["paper", "mine"]) == 1
    assert "0.3" in capsys.readouterr().out
    assert old in GOOD
    (folder / "mine.yaml").write_text(GOOD.replace(old, new))
    assert cli.main(["paper", "mine"]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert "mine.yaml" in last
    parts = message.split(".*")
    assert all(part in last for part in parts), last


def test_runs_of_the_table_s_own_group_are_looked_at_without_being_named(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (home / "runs" / "sumo_table6").mkdir(parents=True)
    assert main(["sumo_table6", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["runs"] == "runs/sumo_table6"


def test_words_are_checked_before_torch_is_imported() -> None:
    program = (
        "import sys; from harness.cli import main; codes = [main(line.split()) for line in sys.argv[1:]];"
        "print(codes, sorted({'torch', 'transformers', 'pandas'} & set(sys.modules)))"
    )
    lines = ["paper", "paper --help", "paper sumo_tabel3", "paper sumo_table3 runs=nowhere"]
    done = subprocess.run(
        [sys.executable, "-c", program, *lines],
        capture_output=True,
        text=True,
        cwd=Path(tables.__file__).parents[2],
        timeout=60,
        check=False,
    )
    assert done.stdout.splitlines()[-1] == "[0, 0, 2, 2] []", done.stderr
