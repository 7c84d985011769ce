"""`optbench paper sumo_theory` from its words to its files."""

from __future__ import annotations

import html
import json
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest

from analysis.paper.command import main, names
from analysis.paper.theory import findings, report
from analysis.paper.theory.findings import Theory
from harness.errors import InputError
from tests.analysis.synthetic import Recipe, write


@pytest.fixture(scope="module")
def lemmas() -> Theory:
    """The lemmas alone, without runs."""
    return findings.compute([])


def test_it_is_listed_and_completed(capsys: pytest.CaptureFixture[str]) -> None:
    assert names()[-1] == "sumo_theory"
    assert main(["--list"]) == 0
    assert "sumo_theory" in capsys.readouterr().out
    assert main(["--list", "--json"]) == 0
    assert [entry["name"] for entry in json.loads(capsys.readouterr().out)["analyses"]] == ["sumo_theory"]


def test_the_lemmas_check_themselves(lemmas: Theory) -> None:
    assert lemmas.passed
    assert sum(check.name.startswith("control") for check in lemmas.checks) == 2
    assert "no real moments" in findings.headline(lemmas)
    # A simulation that is off by more than rounding, and a control that passes, fail the page.
    lemmas.bounds[0] = lemmas.bounds[0]._replace(deviation=1e-6)
    assert not lemmas.passed
    lemmas.bounds[0] = lemmas.bounds[0]._replace(deviation=0.0)
    muon = lemmas.scans["muon"]
    lemmas.scans["muon"] = muon._replace(violated=0)
    assert [check.name for check in lemmas.checks if not check.passed] == [
        "control: Muon's coefficients violate the bound"
    ]
    lemmas.scans["muon"] = muon


def test_the_page_warns_of_what_fails_alone(lemmas: Theory) -> None:
    """Findings are a list of their own and passed checks a table: neither is red."""
    warned = '<ul class="warnings"'
    text = report.page(lemmas)
    assert warned not in text
    assert text.index('<ul class="findings">') < text.index("What this page checks of itself")
    lemmas.bounds[0] = lemmas.bounds[0]._replace(deviation=1e-6)
    failing = report.page(lemmas)
    lemmas.bounds[0] = lemmas.bounds[0]._replace(deviation=0.0)
    _, _, rest = failing.partition(warned)
    assert rest.partition("</ul>")[0].count("<li>FAILED: ") == 1


def test_without_runs_it_tells_how_to_make_them(lemmas: Theory, capsys: pytest.CaptureFixture[str]) -> None:
    report.show(lemmas, sys.stdout)
    printed = capsys.readouterr().out
    assert all(command in printed for command in findings.COMMANDS)
    assert "violated" in printed
    assert printed.startswith(findings.QUESTION)
    assert "No run was read" in printed
    assert main(["sumo_theory", "--commands"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines == list(findings.COMMANDS)
    for line in lines:
        words = shlex.split(line)
        values = dict(word.split("=") for word in words if "=" in word)
        assert words[:3] == ["optbench", "compare", "sumo"]
        # The comparison is at equal rates and subspaces.
        if "sumo_ns5" in words:
            for key in ("lr", "aux_lr", "refresh_interval"):
                assert values[f"sumo.{key}"] == values[f"sumo_ns5.{key}"]


def test_files_of_runs_without_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], lemmas: Theory
) -> None:
    monkeypatch.chdir(tmp_path)
    options: dict[str, Any] = {"orthogonalizer_steps": 5, "nesterov": False}
    for seed in range(2):
        for name, method in (("sumo", "auto"), ("sumo_ns5", "newton_schulz")):
            write(Path("a"), Recipe(name, seed=seed, options=options | {"orthogonalizer": method}))
    write(Path("b"), Recipe("adamw", state="failed", stop_at=50))
    monkeypatch.setattr("analysis.paper.theory.moment_rank.rows", lambda: lemmas.ranks)
    assert main(["sumo_theory", "runs=a", "runs=b", "--out", "written", "--json"]) == 0
    captured = capsys.readouterr()
    assert captured.err.split() == [f"written/sumo_theory.{ending}" for ending in ("json", "md", "html")]
    document = json.loads(captured.out)
    assert document == json.loads(Path("written/sumo_theory.json").read_text())
    assert (document["table"], document["runs_read"], document["runs"]) == ("sumo_theory", 4, ["a", "b"])
    assert {row["optimizer"] for row in document["figure_1"]["condition_numbers"]} == {"sumo", "sumo_ns5"}
    assert document["figure_2"][-1]["difference"]["n"] == 2
    assert document["errors"] == document["one_step"] == []
    assert any("no checkpoint" in note for note in document["notes"])
    assert any("not finished, left out" in note for note in document["notes"])
    page = Path("written/sumo_theory.html").read_text()
    assert all(f"paper-{key}" in page for key in ("rank", "bound", "condition", "share", "paired"))
    text = Path("written/sumo_theory.md").read_text()
    assert "## Lemma 3.2: for which iteration it holds" in text
    assert "| cubic_gram |" in text
    # The question comes before the answer, and the scope is that of the runs.
    assert html.escape(findings.QUESTION) in page.replace("&#39;", "&#x27;")
    assert text.index(findings.QUESTION) < text.index(document["sentence"])
    assert document["scope"].count("llama_tiny, 200 steps of 16×128") == 1
    assert "4 runs)" in document["scope"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["sumo_table3", "runs=a", "runs=b"], "runs: a b is more than one folder; fix: runs=a"),
        (["sumo_theory", "runs=nowhere"], "runs: nowhere is not a folder"),
        (["sumo_teory"], "fix: optbench paper sumo_theory"),
        (["sumo_theory", "rnus=x"], "rnus: x is for an unknown key; allowed: runs; fix: runs=DIR"),
    ],
)
def test_bad_words(words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    with pytest.raises(InputError) as error:
        main(words)
    assert message in str(error.value)
