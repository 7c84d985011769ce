"""The arguments that `optbench report` understands, and those that it refuses."""

from pathlib import Path

import pytest

from analysis.report.command import ReportRequest, parse
from harness.errors import InputError


def test_report_words() -> None:
    assert parse(["runs/a"]) == ReportRequest(Path("runs/a"), Path("runs/a"), False)
    assert parse(["runs/a", "--out", "b", "--json"]) == ReportRequest(Path("runs/a"), Path("b"), True)
    assert parse(["--out=b", "runs/a"]) == ReportRequest(Path("runs/a"), Path("b"), False)


def test_report_words_for_wandb() -> None:
    assert parse(["--wandb", "a"]) == ReportRequest(Path("a"), Path("a"), False, wandb=True)
    assert parse(["a", "--wandb=team/p"]).project == ("team", "p")
    assert parse(["a", "--wandb=p"]).project == (None, "p")
    for words in (
        ["team/p/g", "--export", "a"],
        ["--wandb", "team/p/g", "--export=a"],
        ["--wandb=team/p/g", "--export", "a"],
    ):
        assert parse(words) == ReportRequest(Path("a"), Path("a"), False, export=("team", "p", "g"))
    assert parse(["team/p", "--export", "a", "--json"]).export == ("team", "p", None)
    assert parse(["team/p/g/h", "--export", "a"]).export == ("team", "p", "g/h")


@pytest.mark.parametrize(
    "words",
    [
        [], ["a", "b"], ["a", "--wandbb"], ["a", "--out"], ["--json"], ["a", "--wandb=x/y/z"], ["a", "--wandb=/p"],
        ["--export", "a"], ["p", "--export", "a"], ["team/p/", "--export", "a"], ["team/p", "--export"],
        ["team/p", "--export", "--json"], ["team/p", "x", "--export", "a"],
    ],
)  # fmt: skip
def test_report_words_that_are_refused(words: list[str]) -> None:
    with pytest.raises(InputError):
        parse(words)
