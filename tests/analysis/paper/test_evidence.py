"""Which finished runs are taken as measured: real ones, and copies of them with one key changed."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from analysis.paper.cells import FilledTable, PaperCell
from analysis.paper.filling import fill
from harness.errors import InputError
from harness.preparation import prepare
from harness.run import execute
from tests.harness.running import SMALL_MODEL, small, write_documents

ROW = {"words": ["optimizer=sumo_paper", "optimizer.rank=$rank"], "unstated": ["optimizer.lr"]}
SETTING = ["steps=4", "batch_size=8", "seq_len=32", "eval.tokens=256", "precision=bf16_pure"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two finished runs of one cell, seeds 0 and 1."""
    home = tmp_path_factory.mktemp("home")
    corpus = write_documents(home)
    for seed in (0, 1):
        words = [
            *SETTING,
            "optimizer=sumo_paper",
            "optimizer.rank=8",
            f"seed={seed}",
            "group=g",
            f"name=run{seed}",
        ]
        prepared = prepare(small(corpus, home / "runs", *words), say=lambda text: None, worker=True)
        assert execute(prepared) == "finished"
    return home


@pytest.fixture
def home(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder copied, with a table whose cell the two runs belong in."""
    shutil.copytree(trained / "runs", tmp_path / "runs")
    data = ["data=jsonl", f"data.files=[{trained / 'documents.jsonl'}]", "data.vocab_size=512"]
    larger = [word.replace("num_hidden_layers=2", "num_hidden_layers=3") for word in SMALL_MODEL]
    content = {
        "title": "a model that trains in a second",
        "source": {"paper": "made for this test", "arxiv": "0000.00000", "table": "1"},
        "provenance": {"published": "derived"},
        "words": [*SETTING, *data, "data.validation_tokens=600"],
        "quantities": {
            "perplexity": {"kind": "perplexity", "tolerance": 0.01},
            "memory": {"kind": "memory", "unit": "GiB", "tolerance": 0.01},
        },
        "columns": {
            "small": {"words": list(SMALL_MODEL), "values": {"rank": 8}},
            "large": {"words": larger, "values": {"rank": 8}},
        },
        "rows": {
            "SUMO": {
                **ROW,
                "published": {
                    "small": {"perplexity": f"{measured(tmp_path / 'runs'):.2f}", "memory": "0.0002"},
                    "large": {"perplexity": "100.0"},
                },
            },
            "Adam": {"words": ["optimizer=adamw"], "published": {"small": {"perplexity": "100.0"}}},
        },
    }
    (tmp_path / "configs" / "paper").mkdir(parents=True)
    (tmp_path / "configs" / "paper" / "tiny.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def measured(runs: Path) -> float:
    """exp of the mean of the last validation losses, read by hand out of metrics.jsonl."""
    losses = []
    for path in sorted(runs.glob("g/run*/metrics.jsonl")):
        last = json.loads(path.read_text().splitlines()[-1])
        assert last["step"] == 4
        losses.append(last["val/loss"])
    assert len(losses) == 2
    return math.exp(sum(losses) / 2)


def cells(filled: FilledTable) -> dict[tuple[str, str], PaperCell]:
    return {(cell.row, cell.column): cell for cell in filled.cells}


def edit(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = folder / "config.yaml"
    config = yaml.safe_load(path.read_text())
    change(config)
    path.write_text(yaml.safe_dump(config))


def summary(folder: Path, **values: Any) -> None:
    path = folder / "summary.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_runs_of_the_protocol_fill_their_cell_and_no_other(home: Path) -> None:
    filled = fill("tiny", home / "runs")
    found = cells(filled)
    cell = found["SUMO", "small perplexity"]
    assert cell.measured == pytest.approx(measured(home / "runs"), rel=1e-12)
    assert (cell.status, cell.runs) == ("agrees", ["g/run0", "g/run1"])
    for other in (found["SUMO", "large perplexity"], found["Adam", "small perplexity"]):
        assert (other.measured, other.status) == (None, "not_run")
    assert filled.remarks == []
    # What is filled needs no run any more.
    assert list(filled.commands.values()) == [["SUMO, large perplexity"], ["Adam, small perplexity"]]


def test_measured_memory_is_what_the_run_held(home: Path) -> None:
    found = cells(fill("tiny", home / "runs"))["SUMO", "small memory"]
    held = json.loads((home / "runs/g/run0/summary.json").read_text())["memory_bytes"]
    assert found.measured == pytest.approx((held["weights"] + held["optimizer_state"]) / 2**30, rel=1e-12)
    assert found.predicted is not None
    parameters = json.loads((home / "runs/g/run0/summary.json").read_text())["parameters"]
    # A state number takes 4 bytes in the run and 2 in the table's accounting.
    assert held["optimizer_state"] == pytest.approx(2 * (found.predicted * 2**30 - 2 * parameters), rel=1e-9)


def test_measured_memory_that_differs_is_excused_only_if_the_plan_says_the_same(home: Path) -> None:
    text = (home / "configs/paper/tiny.yaml").read_text()
    predicted = cells(fill("tiny"))["SUMO", "small memory"].predicted
    assert predicted is not None
    (home / "configs/paper/tiny.yaml").write_text(text.replace("'0.0002'", f"'{predicted:.6f}'"))
    assert cells(fill("tiny"))["SUMO", "small memory"].status == "agrees"
    found = cells(fill("tiny", home / "runs"))["SUMO", "small memory"]
    assert found.status == "differs_known"
    assert "fp32" in found.reason
    held = json.loads((home / "runs/g/run0/summary.json").read_text())["memory_bytes"]
    for name in ("run0", "run1"):
        summary(
            home / "runs/g" / name, memory_bytes={**held, "optimizer_state": held["optimizer_state"] * 1.1}
        )
    assert cells(fill("tiny", home / "runs"))["SUMO", "small memory"].status == "differs"


def test_fp32_is_no_excuse_where_the_table_counts_four_bytes_itself(home: Path) -> None:
    path = home / "configs/paper/tiny.yaml"
    path.write_text(path.read_text().replace("kind: memory", "kind: memory\n    bytes_per_number: 4"))
    for folder in ("run0", "run1"):
        held = json.loads((home / "runs/g" / folder / "summary.json").read_text())["memory_bytes"]
        predicted = cells(fill("tiny"))["SUMO", "small memory"].predicted
        assert predicted is not None
        held["weights"] = predicted * 2**30 - held["optimizer_state"]
        summary(home / "runs/g" / folder, memory_bytes=held)
        edit(home / "runs/g" / folder, _set("precision", to="fp32"))
    path.write_text(path.read_text().replace("precision=bf16_pure", "precision=fp32"))
    found = cells(fill("tiny", home / "runs"))["SUMO", "small memory"]
    assert found.measured == pytest.approx(found.predicted, rel=1e-9)
    assert (found.status, found.reason) == ("differs", "")


def _set(*path: str, to: Any) -> Callable[[dict[str, Any]], None]:
    def change(config: dict[str, Any]) -> None:
        for part in path[:-1]:
            config = config[part]
        assert config[path[-1]] != to
        config[path[-1]] = to

    return change


@pytest.mark.parametrize(
    ("change", "key"),
    [
        (_set("optimizer", "rank", to=4), "optimizer.rank"),
        (_set("optimizer", "side", to="long"), "optimizer.side"),
        (_set("model", "config", "num_attention_heads", to=4), "model.config.num_attention_heads"),
        (_set("steps", to=5), "steps"),
        (_set("seq_len", to=64), "seq_len"),
        (_set("batch_size", to=16), "batch_size"),
        (_set("precision", to="bf16"), "precision"),
        (_set("schedule", "warmup", to=0.2), "schedule.warmup"),
        (_set("eval", "tokens", to=128), "eval.tokens"),
        (_set("data", "files", to=["other.jsonl"]), "data.files"),
        (_set("data", "mode", to="padded"), "data.mode"),
    ],
)
def test_control_a_run_of_another_setting_is_not_taken(
    change: Callable[[dict[str, Any]], None], key: str, home: Path
) -> None:
    shutil.rmtree(home / "runs/g/run1")
    edit(home / "runs/g/run0", change)
    filled = fill("tiny", home / "runs")
    assert {cell.measured for cell in filled.cells} == {None}
    assert filled.remarks == [f"g/run0: not used; closest to SUMO, small, differs in {key}"]


def test_control_a_run_that_trained_with_another_rank_is_not_taken(trained: Path, home: Path) -> None:
    words = [*SETTING, "optimizer=sumo_paper", "optimizer.rank=4", "group=g", "name=other"]
    prepared = prepare(
        small(trained / "documents.jsonl", home / "runs", *words), say=lambda text: None, worker=True
    )
    assert execute(prepared) == "finished"
    filled = fill("tiny", home / "runs")
    assert cells(filled)["SUMO", "small perplexity"].runs == ["g/run0", "g/run1"]
    assert filled.remarks == ["g/other: not used; closest to SUMO, small, differs in optimizer.rank"]


def test_control_a_text_read_twice_is_another_protocol(home: Path) -> None:
    summary(home / "runs/g/run1", epochs=1.5)
    filled = fill("tiny", home / "runs")
    assert cells(filled)["SUMO", "small perplexity"].runs == ["g/run0"]
    assert filled.remarks == ["g/run1: not used; closest to SUMO, small, differs in data.max_tokens"]


def test_runs_that_are_not_over_or_cannot_be_read_are_named(home: Path) -> None:
    summary(home / "runs/g/run0", state="diverged", **{"val/loss": None})
    (home / "runs/g/run1/config.yaml").write_text("stepz: 3\n")
    filled = fill("tiny", home / "runs")
    assert {cell.measured for cell in filled.cells} == {None}
    assert filled.remarks[0] == "g/run0: not used, diverged"
    assert filled.remarks[1].startswith("g/run1: not used, stepz: 3 is for an unknown key")


def test_of_several_values_of_a_key_that_is_left_open_the_best_is_taken_and_named(home: Path) -> None:
    """Its mean over seeds is taken, not the best run."""
    shutil.copytree(home / "runs/g/run1", home / "runs/g/other")
    edit(home / "runs/g/other", _set("optimizer", "lr", to=0.5))
    summary(home / "runs/g/run0", **{"val/loss": 4.0})
    summary(home / "runs/g/run1", **{"val/loss": 5.0})
    summary(home / "runs/g/other", **{"val/loss": 4.4})
    cell = cells(fill("tiny", home / "runs"))["SUMO", "small perplexity"]
    assert cell.measured == pytest.approx(math.exp(4.4))
    assert cell.runs == ["g/other"]
    assert cell.reason == "the best of 2 settings: optimizer.lr=0.5"


def test_memory_is_that_of_the_setting_whose_perplexity_stands_beside_it(home: Path) -> None:
    """Where the rank itself is left open, memory of one rank beside the loss of another would be no run's."""
    path = home / "configs/paper/tiny.yaml"
    path.write_text(path.read_text().replace("- optimizer.lr\n", "- optimizer.lr\n    - optimizer.rank\n"))
    shutil.copytree(home / "runs/g/run1", home / "runs/g/other")
    edit(home / "runs/g/other", _set("optimizer", "rank", to=4))
    summary(home / "runs/g/other", memory_bytes={"weights": 0, "optimizer_state": 2**30}, **{"val/loss": 1.0})
    found = cells(fill("tiny", home / "runs"))
    assert found["SUMO", "small perplexity"].runs == found["SUMO", "small memory"].runs == ["g/other"]
    assert found["SUMO", "small memory"].measured == 1.0
    summary(home / "runs/g/other", **{"val/loss": 9.0})
    assert cells(fill("tiny", home / "runs"))["SUMO", "small memory"].runs == ["g/run0", "g/run1"]


def test_engines_that_share_a_state_measure_no_memory(home: Path) -> None:
    for name in ("run0", "run1"):
        edit(home / "runs/g" / name, _set("engine", "name", to="fsdp2"))
    found = cells(fill("tiny", home / "runs"))
    assert found["SUMO", "small memory"].measured is None
    assert found["SUMO", "small perplexity"].measured is not None


def test_a_run_that_is_far_from_every_cell_is_named_in_one_line(home: Path) -> None:
    shutil.rmtree(home / "runs/g/run1")
    for path in (("steps",), ("seq_len",), ("batch_size",), ("eval", "tokens"), ("optimizer", "rank")):
        edit(home / "runs/g/run0", _set(*path, to=16))
    edit(home / "runs/g/run0", _set("data", "mode", to="padded"))
    edit(home / "runs/g/run0", _set("precision", to="fp32"))
    (line,) = fill("tiny", home / "runs").remarks
    assert line.endswith(" and 1 more")


def test_a_folder_that_is_not_there(home: Path) -> None:
    with pytest.raises(InputError, match="nowhere is not a folder"):
        fill("tiny", home / "nowhere")
