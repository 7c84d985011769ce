"""Cells of task metrics: read from run folders by seed, in the metric's direction, next to what was published."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from analysis.paper import tables
from analysis.paper.cells import PaperCell
from analysis.paper.filling import count, fill
from harness.config import checks, compose
from harness.tasks.metrics import METRICS

TABLE = "excerpt"
ROW = "SUMO-SVD, rank 4"
RTE = (ROW, "RTE score")


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with two columns of one row of Table 8 as a table of its own, which is filled in less time."""
    content = yaml.safe_load(tables.path_of("sumo_table8").read_text(encoding="utf-8"))
    row = content["rows"][ROW]
    row["published"] = {name: row["published"][name] for name in ("RTE", "SST-2")}
    content["rows"] = {ROW: row}
    content["columns"] = {name: content["columns"][name] for name in row["published"]}
    (tmp_path / "configs" / "paper").mkdir(parents=True)
    (tmp_path / "configs" / "paper" / f"{TABLE}.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_run(
    home: Path, value: float, *words: str, metric: str = "accuracy", seed: int = 0, path: str | None = "m"
) -> None:
    """A finished run of the cell of RTE, with these overrides and this metric (fraction) at its end."""
    table = tables.load(TABLE)
    own = {word.partition("=")[0] for word in words}
    protocol = [w for w in table.run_words(ROW, "RTE") if w.partition("=")[0] not in own]
    composed = compose.load([*protocol, *words, f"seed={seed}", "world_size=1"])
    config = checks.check(composed, environ={}, devices=0)
    # What a run finds in its data is in its record.
    found = {
        "target": "class",
        "labels": ["entailment", "not_entailment"],
        "metric": config.task.metric or metric,
    }
    config = config.model_copy(
        update={
            "model": config.model.model_copy(update={"path": path}),
            "task": config.task.model_copy(update=found),
            "steps": 4667,
        }
    )
    folder = home / "runs" / f"run{len(list(home.glob('runs/*')))}"
    folder.mkdir(parents=True)
    summary: dict[str, Any] = {
        "seed": seed,
        "optimizer": config.optimizer.name,
        "val/loss": 0.5,
        "wall_s": 60.0,
    }
    facts = METRICS[metric]
    summary["metrics"] = {metric: {"value": value, "better": facts.better, "unit": facts.unit}}
    (folder / "config.yaml").write_text(compose.to_yaml(config))
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "status.json").write_text(
        json.dumps({"state": "finished", "identity": str(seed), "step": 4667})
    )
    (folder / "DONE").touch()


def filled(home: Path) -> tuple[dict[tuple[str, str], PaperCell], list[str]]:
    found = fill(TABLE, home / "runs")
    return {(cell.row, cell.column): cell for cell in found.cells}, found.remarks


def test_the_mean_over_seeds_is_measured_in_percent(home: Path) -> None:
    for seed, value in enumerate((0.80, 0.81, 0.82)):
        write_run(home, value, seed=seed)
    cells, remarks = filled(home)
    cell = cells[RTE]
    assert (cell.measured, cell.measured_std) == (pytest.approx(81.0), pytest.approx(1.0))
    assert (cell.published.value, cell.published.std, cell.quantity.unit) == (81.08, 0.019, "%")
    assert cell.status == "close"  # 81.0 for 81.08, within 1 %
    assert len(cell.runs) == 3
    assert not remarks
    assert sum(other.measured is not None for other in cells.values()) == 1


def test_the_better_setting_is_taken_where_higher_is_better(home: Path) -> None:
    write_run(home, 0.70)
    write_run(home, 0.75, "optimizer.momentum=0.9")
    cell = filled(home)[0][RTE]
    assert cell.measured == pytest.approx(75.0)
    assert cell.status == "differs"
    assert "the best of 2 settings" in cell.reason


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["epochs=3"], "epochs"),
        (["batch_size=32"], "batch_size"),
        (["optimizer.lr=1e-3"], "optimizer.lr"),
        (["model.config.num_hidden_layers=6"], "model.config.num_hidden_layers"),
        (["model.adapter=lora"], "model.adapter"),
    ],
)
def test_a_run_of_another_protocol_fills_no_cell(home: Path, words: list[str], named: str) -> None:
    write_run(home, 0.8, *words)
    cells, remarks = filled(home)
    assert all(cell.measured is None for cell in cells.values())
    assert len(remarks) == 1
    assert f"differs in {named}" in remarks[0]


def test_random_weights_fill_no_cell(home: Path) -> None:
    write_run(home, 0.8, path=None)
    assert "random weights" in filled(home)[1][0]


def test_a_run_without_the_metric_measures_nothing(home: Path) -> None:
    write_run(home, 0.8, metric="f1")
    assert filled(home)[0][RTE].measured is None


def test_standard_deviations_that_few_runs_cannot_have_are_named() -> None:
    """One of k runs with one of 277 answers changed has (100/277)/√k: 0.019 takes (0.361/0.019)² = 361.03 runs."""
    (note,) = [note for note in fill(TABLE).notes if note.startswith("RTE")]
    assert "one of 277 examples is 0.361 points" in note
    assert "one of 0.019 at least 362" in note


def test_commands_have_the_users_model() -> None:
    command = next(iter(fill(TABLE).commands))
    assert command.startswith("optbench train experiment=glue_galore model=roberta_base data.name=")
    assert "model.path=models/roberta-base" in command
    assert "model.path=null" not in command


@pytest.mark.parametrize(("rank", "expected"), [(4, 251.95), (8, 254.60)])
def test_memory_of_low_rank_state(rank: int, expected: float) -> None:
    """Closed form: 2 bytes a weight, 4 a number of the state of 72 hidden matrices, (m + n)·r each."""
    words = ["experiment=glue_galore", "model.path=null", "optimizer=sumo_paper", f"optimizer.rank={rank}"]
    config = checks.check(compose.load([*words, "world_size=1"]), environ={}, devices=0)
    counted = count(config)
    assert counted is not None
    account = tables.Accounting(
        counts=["weights", "low_rank_state"], bytes_per_number=2, bytes_per_state_number=4
    )
    layer = 4 * (768 + 768) + 2 * (768 + 3072)
    d, vocab, positions = 768, 50265, 514
    embeddings = (vocab + positions + 1) * d + 2 * d
    block = 4 * (d * d + d) + 2 * d * 3072 + 3072 + d + 4 * d
    head = d * d + d + 2 * d + 2
    weights = embeddings + 12 * block + head
    assert counted.memory(account) == 2 * weights + 4 * 12 * rank * layer
    assert counted.memory(account) / 1e6 == pytest.approx(expected, abs=0.01)


@pytest.mark.slow
def test_memory_of_table_2() -> None:
    """The accounting that gives GaLore's and full fine-tuning's figures does not give SUMO's, which say so."""
    cells = {cell.row: cell for cell in fill("sumo_table2").cells if cell.column == "RoBERTa-base memory"}
    assert cells["Full fine-tuning"].predicted == pytest.approx(747.88, abs=0.01)
    for rank, long, short, sumo in ((4, 253.72, 252.83, 251.95), (8, 258.14, 256.37, 254.60)):
        assert cells[f"GaLore, rank {rank}"].predicted == pytest.approx(long, abs=0.01)
        assert cells[f"GaLore, rank {rank}, moments on the short side"].predicted == pytest.approx(
            short, abs=0.01
        )
        for method in ("SUMO-NS5", "SUMO-SVD"):
            cell = cells[f"{method}, rank {rank}"]
            assert cell.predicted == pytest.approx(sumo, abs=0.01)
            assert cell.status == "differs_known"
            assert "below the weights alone" in cell.reason
