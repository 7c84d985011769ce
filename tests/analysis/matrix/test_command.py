"""The matrix from run folders with a known interaction, without one, and with runs that belong in no cell."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml

from analysis.matrix import arguments, results
from analysis.matrix.command import main
from harness.errors import InputError
from tests.analysis.synthetic import Recipe, write

NAMES = ("adamw", "muon", "sumo")
EXAMPLES = 400


def fine_tuned(
    root: Path, row: str, column: str, seed: int, accuracy: float, *, changed: dict[str, Any] | None = None
) -> Path:
    """A finished run of one cell whose answers are right with this probability; the examples are those of all runs."""
    rng = np.random.default_rng([seed, *row.encode(), *column.encode()])
    # An example is as hard for every run, with some noise of the run's own.
    hardness = np.random.default_rng(7).random(EXAMPLES)
    correct = hardness + rng.normal(0, 0.05, EXAMPLES) < accuracy
    value = float(correct.mean())
    model = {
        "name": row,
        "path": f"models/{row}-seed{seed}",
        "model_type": "llama",
        "config": {"hidden_size": 128},
    }
    data = {"name": "mine", "tokenizer": model["path"]}  # a tokenizer comes with its model
    overrides = {"model": model, "data": data, "name": results.run_name(row, column, seed), **(changed or {})}
    overrides["task"] = {"name": "classify", "metric": "accuracy"}
    summary = {"metrics": {"accuracy": {"value": value, "better": "higher", "unit": "fraction"}}}
    recipe = Recipe(column, seed=seed, overrides=overrides, summary=summary, has_moments=False)
    folder = write(root, recipe, results.run_name(row, column, seed))
    answers = pd.DataFrame({"example": np.arange(EXAMPLES), "reference": "yes", "correct": correct})
    answers["prediction"] = np.where(correct, "yes", "no")
    answers.to_parquet(folder / "predictions.parquet")
    return folder


def matrix(root: Path, *, match: float, seeds: int = 4) -> Path:
    rows, columns = (
        dict(zip(NAMES, (0.0, 0.05, 0.02), strict=True)),
        dict(zip(NAMES, (0.0, -0.03, 0.04), strict=True)),
    )
    for row in NAMES:
        for column in NAMES:
            for seed in range(seeds):
                rng = np.random.default_rng([seed, *row.encode()])
                accuracy = 0.6 + rows[row] + columns[column] + match * (row == column) + rng.normal(0, 0.02)
                fine_tuned(root, row, column, seed, accuracy)
    return root


def reported(root: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert main([str(root), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_known_interaction_is_found_with_its_size(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    document = reported(matrix(tmp_path / "runs", match=0.08), capsys)
    assert document["metric"] == {"name": "accuracy", "better": "higher", "unit": "fraction"}
    assert (document["favours"], document["interacts"]) == ("matched", True)
    matching = document["matching"]
    assert matching["mean"] == pytest.approx(0.08, abs=0.015)
    assert matching["of_examples"]
    assert matching["resampled"][0] < matching["mean"] < matching["resampled"][1]
    assert "raises validation accuracy by" in document["sentence"]
    assert {cell["n"] for cell in document["cells"]} == {4}
    page = (tmp_path / "runs" / "matrix.html").read_text()
    assert "Analysis of variance" in page
    assert "then muon" in (tmp_path / "runs" / "matrix.md").read_text()


def test_additive_effects_are_no_interaction(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    document = reported(matrix(tmp_path / "runs", match=0.0), capsys)
    assert (document["favours"], document["interacts"]) == (None, False)
    assert document["sentence"].startswith("Nothing shows")
    assert "could not be told from none" in document["detail"]
    effects = document["effects"]["fine-tuning"]
    assert effects["sumo"]["mean"] > effects["adamw"]["mean"] > effects["muon"]["mean"]


def test_where_lower_is_better_the_sign_turns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without a metric the loss is compared; a lower one of matched pairs favours them."""
    for row in ("adamw", "muon"):
        for column in ("adamw", "muon"):
            for seed in range(3):
                folder = fine_tuned(tmp_path, row, column, seed, 0.5)
                summary = json.loads((folder / "summary.json").read_text())
                del summary["metrics"]
                summary["val/loss"] = (
                    2.0 - 0.5 * (row == column) + 0.01 * seed + 0.002 * (seed == 1) * (row == column)
                )
                (folder / "summary.json").write_text(json.dumps(summary))
                config = yaml.safe_load((folder / "config.yaml").read_text())
                del config["task"]
                (folder / "config.yaml").write_text(yaml.safe_dump(config))
    document = reported(tmp_path, capsys)
    assert (document["metric"]["name"], document["favours"]) == ("loss", "matched")
    assert document["matching"]["mean"] == pytest.approx(-0.5, abs=0.01)
    assert not document["matching"]["of_examples"]


def test_runs_of_other_protocols_and_unfinished_seeds_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = matrix(tmp_path / "runs", match=0.0, seeds=2)
    fine_tuned(root, "adamw", "muon", 5, 0.6)
    fine_tuned(root, "adamw", "muon", 6, 0.6, changed={"batch_size": 64})
    write(root, Recipe("adamw", seed=9), "pretraining")
    document = reported(root, capsys)
    assert document["seeds"] == [0, 1]
    remarks = "\n".join(document["remarks"])
    assert "seed6: not used, differs from the others in batch_size" in remarks
    assert "pretraining: not used, its model was not pretrained" in remarks
    assert "seeds 5 are not used" in remarks


def test_one_seed_claims_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    document = reported(matrix(tmp_path / "runs", match=0.3, seeds=1), capsys)
    assert (document["favours"], document["interacts"]) == (None, False)
    assert document["sentence"].startswith("One seed")


def test_half_a_table_claims_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for seed in range(2):
        fine_tuned(tmp_path, "adamw", "muon", seed, 0.5)
    assert reported(tmp_path, capsys)["sentence"].startswith("There is no complete table")


def pretrained(root: Path) -> Path:
    for name in NAMES:
        for seed in (0, 1):
            write(root, Recipe(name, seed=seed, has_moments=False))
    return root


def test_the_plan_is_every_model_with_every_optimizer(tmp_path: Path) -> None:
    folder = pretrained(tmp_path / "pretrained")
    plan = arguments.read(["adamw", "muon", f"pretrained={folder}", "muon.lr=0.02", "group=g", "steps=5"])
    assert not isinstance(plan, Path)
    runs = plan.runs()
    assert len(runs) == 3 * 2 * 2
    assert [words[-1] for words in runs[:2]] == ["name=adamw-then-adamw-seed0", "name=adamw-then-muon-seed0"]
    assert {"optimizer=muon", "optimizer.lr=0.02", "model.name=adamw", "seed=0", "steps=5"} <= set(runs[1])
    (path,) = [word for word in runs[1] if word.startswith("model.path=")]
    assert "g-models/adamw-seed0-" in path


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (["adamw"], "pretrained: nothing is required"),
        (["adamw", "pretrained=nowhere"], "is not a folder"),
        (["adamw", "pretrained={folder}", "seeds=3"], "are not all among the finished pretraining runs"),
        (["adamw", "pretrained={folder}", "model.path=x"], "is that of the pretrained runs"),
        (["pretrained={folder}"], "names no optimizer"),
    ],
)
def test_what_is_refused(tmp_path: Path, words: list[str], match: str) -> None:
    folder = pretrained(tmp_path / "pretrained")
    with pytest.raises(InputError, match=match):
        arguments.read([word.format(folder=folder) for word in words])


def test_one_optimizer_is_no_matrix(tmp_path: Path) -> None:
    write(tmp_path / "p", Recipe("adamw"))
    with pytest.raises(InputError, match="finished runs of 1 optimizers; a matrix has two or more"):
        arguments.read(["adamw", f"pretrained={tmp_path / 'p'}"])
