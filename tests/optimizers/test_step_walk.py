"""The count of files and functions that a step enters sees the rule and every call around it."""

from __future__ import annotations

import json

import pytest

from benchmarks.step_walk import main, walk


def test_the_walk_finds_the_rule(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    entered = document["entered"]
    assert document["files"] == len(entered) > 0
    assert document["functions"] == sum(len(names) for names in entered.values())
    assert next(iter(entered)) == "optimizers/optimizer.py"
    assert "LowRankRule.update" in entered["optimizers/rules/low_rank.py"]


def test_functions_outside_the_project_do_not_count() -> None:
    assert walk(lambda: json.dumps([1])) == {"tests/optimizers/test_step_walk.py": []}
