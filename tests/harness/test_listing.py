"""`optbench list` and `optbench show`."""

from __future__ import annotations

import json

import pytest

from harness import cli


def as_json(capsys: pytest.CaptureFixture[str], *words: str) -> dict:
    assert cli.main([*words, "--json"]) == 0
    output = capsys.readouterr()
    assert output.err == ""
    return json.loads(output.out)


def test_list_names_everything(capsys: pytest.CaptureFixture[str]) -> None:
    from optimizers.presets import PRESETS

    content = as_json(capsys, "list")
    assert content["schema_version"] == 1
    models = {row["name"]: row["parameters"] for row in content["models"]}
    assert models["llama_7b"] == 6_738_415_616
    assert {row["name"] for row in content["optimizers"]} >= set(PRESETS)
    assert all(row["about"] and row["source"] for row in content["optimizers"])
    assert {row["name"] for row in content["engines"]} >= {
        "auto",
        "single",
        "ddp",
        "fsdp2",
        "hsdp",
        "zero0",
        "zero3",
    }
    assert "kjv" in {row["name"] for row in content["data"]}


def test_list_for_people_is_not_cut(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["list"]) == 0
    text = capsys.readouterr().out
    for word in ("6,738,415,616", "sumo_official", "arXiv 2505.24749", "kjv", "ddp"):
        assert word in text


def test_show_an_optimizer(capsys: pytest.CaptureFixture[str]) -> None:
    from optimizers.presets import PRESETS

    content = as_json(capsys, "show", "sumo_official")
    options = {row["option"]: row for row in content["options"]}
    assert set(options) == {f"optimizer.{name}" for name in PRESETS["sumo_official"].options}
    assert options["optimizer.alpha"]["default"] == 4.0
    assert options["optimizer.side"]["allowed"] == "short, long"
    assert content["source"]
    assert content["learning_rates"][0]["source"]


def test_show_a_model(capsys: pytest.CaptureFixture[str]) -> None:
    content = as_json(capsys, "show", "llama_60m")
    assert content["kind"] == "models"
    assert content["parameters"] == 58_073_600
    assert {
        "matrix": "model.layers.0.mlp.down_proj.weight",
        "rows": 512,
        "columns": 1376,
        "layers": 8,
    } in content["matrices"]


@pytest.mark.parametrize("name", ["kjv", "quickstart", "train", "optimizer=sumo"])
def test_show_for_people(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["show", name]) == 0
    output = capsys.readouterr()
    assert "about" in output.out
    assert output.err == ""


def test_every_name_can_be_shown(capsys: pytest.CaptureFixture[str]) -> None:
    content = as_json(capsys, "list")
    for kind in ("optimizers", "engines", "data", "schedules", "experiments"):
        for row in content[kind]:
            assert as_json(capsys, "show", row["name"])["name"] == row["name"]
