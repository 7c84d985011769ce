"""Sets of runs of a task: direction, intervals over seeds and examples, verdict, tables, warnings and the document."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from analysis import api
from analysis.comparison import results_table
from analysis.comparison.document import Document, judge_folder, to_json
from analysis.comparison.sets import ComparisonSet
from analysis.report import examples as example_tables
from analysis.report import report_page
from tests.analysis import synthetic
from tests.analysis.synthetic import Answers, Recipe

LABELS = ["no", "yes"]


def answers(accuracy: float, optimizer: int, seed: int, examples: int = 277, own: float = 0.3) -> Answers:
    """A classifier that is right on its easiest examples, in an order of which ``own`` is its optimizer's."""
    truth = np.random.default_rng(1).integers(0, 2, examples)
    ease = np.random.default_rng(2).normal(size=examples)
    ease = ease + own * np.random.default_rng([3, optimizer]).normal(size=examples)
    ease = ease + 0.3 * np.random.default_rng([4, optimizer, seed]).normal(size=examples)
    right = ease >= np.quantile(ease, 1 - accuracy)
    guess = np.where(right, truth, 1 - truth)
    return Answers("accuracy", [LABELS[k] for k in truth], [LABELS[k] for k in guess], LABELS)


def write(root: Path, accuracies: dict[str, float], seeds: int = 5, **changes: Any) -> Path:
    for index, (name, accuracy) in enumerate(accuracies.items()):
        for seed in range(seeds):
            shifted = accuracy + 0.004 * np.random.default_rng([5, index, seed]).normal()
            given = answers(shifted, index, seed, **changes)
            synthetic.write(root, Recipe(name, seed=seed, has_moments=False, answers=given))
    return root


def only(document: Document) -> ComparisonSet:
    (judged,) = document.sets
    return judged.comparison


@pytest.fixture(scope="module")
def clear(tmp_path_factory: pytest.TempPathFactory) -> Document:
    """Muon is 20 points better than AdamW, and its validation loss is higher."""
    root = tmp_path_factory.mktemp("clear")
    write(root, {"adamw": 0.65, "muon": 0.85})
    return judge_folder(root)


def test_a_higher_accuracy_wins_with_an_interval_over_seeds_and_examples(clear: Document) -> None:
    (judged,) = clear.sets
    verdict = judged.verdict
    assert (verdict.kind, verdict.winner) == ("winner", "muon")
    assert verdict.headline.startswith("muon ends highest, ")
    assert verdict.headline.endswith(" points above adamw.")
    assert "Final accuracy 8" in verdict.detail
    assert "5 common seeds and 277 examples, Holm-adjusted p" in verdict.detail
    tests = judged.comparison.tests
    assert tests.mean[0] == pytest.approx(-0.2, abs=0.02)
    assert tests.mean[0] + tests.half_width[0] < 0


def test_the_table_shows_the_intervals_apart_and_together(clear: Document) -> None:
    (judged,) = clear.sets
    heads = [column.head for column in judged.table.columns][:7]
    assert heads == [
        "optimizer",
        "accuracy (%)",
        "± 95 % (points)",
        "± seeds (points)",
        "± examples (points)",
        "n (seeds)",
        "val loss (nats/example)",
    ]
    best = judged.table.rows[0].cells
    assert best["optimizer"].text == "muon"
    assert best["accuracy"].value == pytest.approx(85, abs=1)
    both, seeds, examples = (
        float(best[key].value) for key in ("interval", "seeds_interval", "examples_interval")
    )
    assert both >= max(seeds, examples) * 0.999
    # Binomial: 1.97·sqrt(0.85·0.15/277) = 4.2 points, less what averaging over five seeds takes off.
    assert examples == pytest.approx(4.0, abs=0.5)
    assert seeds < 1
    assert "277 validation examples, each worth 0.36 points" in judged.table.notes
    assert "muon" in results_table.markdown([(judged.table, judged.verdict.sentence)])
    assert "perplexity" not in best


def test_three_points_of_277_examples_name_no_winner_though_the_seeds_agree(tmp_path: Path) -> None:
    write(tmp_path, {"adamw": 0.80, "muon": 0.83}, own=1.0)
    document = judge_folder(tmp_path)
    (judged,) = document.sets
    assert judged.verdict.kind == "no_difference"
    assert judged.verdict.winner is None
    assert "To show a difference of 1 point takes at least" in judged.verdict.detail
    assert judged.verdict.detail.endswith(" examples.")
    tests = judged.comparison.tests
    seeds_alone = judged.comparison.results
    assert (seeds_alone[1] > seeds_alone[0]).all(), "the control: every seed says the same"
    assert tests.p[0] > 0.05


def test_pretraining_and_tasks_share_a_report_but_no_set(tmp_path: Path) -> None:
    write(tmp_path / "task", {"adamw": 0.6, "muon": 0.9}, seeds=2)
    synthetic.group(tmp_path / "text", ["adamw", "sumo"], [0, 1])
    document = judge_folder(tmp_path)
    assert sorted(judged.comparison.measure.name for judged in document.sets) == ["accuracy", "loss"]
    text = results_table.to_csv(judged.table for judged in document.sets)
    head, *rows = csv.reader(io.StringIO(text))
    assert len({len(row) for row in (head, *rows)}) == 1
    assert {"loss [nats/token]", "accuracy [%]", "loss [nats/example]"} <= set(head)
    assert "Mean difference of the final accuracy" in report_page.render(document)


def test_the_document_gains_metrics_and_keeps_its_fields(clear: Document) -> None:
    content = json.loads(json.dumps(to_json(clear), allow_nan=False))
    assert content.keys() == {"schema_version", "runs", "comparison", "warnings"}
    assert content["runs"][0]["metrics"]["accuracy"]["better"] == "higher"
    assert content["runs"][0]["final_loss"] == pytest.approx(3.4, abs=0.2)
    (found,) = content["comparison"]["sets"]
    assert found["measure"] == {
        "name": "accuracy",
        "better": "higher",
        "unit": "fraction",
        "split": "val",
        "key": "val/accuracy",
    }
    assert found["examples"] == 277
    arm = found["arms"][1]
    assert arm["mean"] == pytest.approx(0.85, abs=0.01)
    assert arm["half_width_both_95"] >= arm["half_width_95"]
    assert arm["losses"].keys() == arm["results"].keys() == {str(seed) for seed in range(5)}
    pair = found["pairs"][0]
    assert len(pair["mcnemar"]) == 5
    assert all(test["only_second"] > test["only_first"] and test["p"] < 1e-6 for test in pair["mcnemar"])
    assert 0 < pair["agreement"]["share"] < 1
    assert len(pair["only_second_right"]) > len(pair["only_first_right"])


def test_losses_are_tested_beside_the_metric(clear: Document) -> None:
    comparison = only(clear)
    finals = np.array([[run.final_loss for run in arm.finished] for arm in comparison.arms])
    oracle = stats.ttest_rel(*finals)
    (found,) = to_json(clear)["comparison"]["sets"]
    loss = found["pairs"][0]["loss"]
    assert loss["n"] == 5
    assert loss["difference"] == pytest.approx((finals[0] - finals[1]).mean(), rel=1e-12)
    assert loss["p"] == loss["p_holm"] == pytest.approx(oracle.pvalue, rel=1e-9)
    (row,) = example_tables.losses(comparison).rows
    ends = [float(text.replace("−", "-")) for text in row[2].split(" to ")]
    assert row[0] == "adamw − muon"
    assert ends == pytest.approx(list(oracle.confidence_interval(0.95)), abs=5e-5)
    assert "Differences in validation loss" in report_page.render(clear)


def test_control_no_second_table_where_the_loss_is_compared(tmp_path: Path) -> None:
    synthetic.group(tmp_path, ["adamw", "sumo"], [0, 1])
    document = judge_folder(tmp_path)
    assert only(document).loss_tests is None
    assert example_tables.losses(only(document)).rows == []
    (found,) = to_json(document)["comparison"]["sets"]
    assert "loss" not in found["pairs"][0]
    assert "Differences in validation loss" not in report_page.render(document)


def test_one_common_seed_has_no_test_of_the_loss(tmp_path: Path) -> None:
    write(tmp_path, {"adamw": 0.6, "muon": 0.9}, seeds=1)
    assert example_tables.losses(only(judge_folder(tmp_path))).rows == []


def test_tables_of_python_have_a_column_for_the_metric(clear: Document) -> None:
    frame = api.load_runs(clear.folder)
    expected = [run.final(run.measure) for run in clear.runs]
    assert frame["val/accuracy"].tolist() == expected
    assert frame.loc["muon-seed0", "val/accuracy"] == pytest.approx(0.85, abs=0.02)


def test_the_page_lists_the_examples_that_change(clear: Document) -> None:
    comparison = only(clear)
    rows = example_tables.changed(comparison).rows
    results = comparison.examples
    assert results is not None
    always_right = [row for row in rows if row[0] == "muon" and not row[2].startswith("and")]
    assert len(always_right) == example_tables.MOST
    for row in always_right:
        place = int(row[2])
        assert results.references[place] == row[3]
        assert all(
            results.correct(1, seed)[place] and not results.correct(0, seed)[place] for seed in range(5)
        )
    shown = example_tables.agreement(comparison).rows
    assert [row[0] for row in shown] == ["adamw: two seeds", "muon: two seeds", "adamw : muon"]
    page = report_page.render(clear)
    assert example_tables.all_metrics(comparison).rows[0][0] == "muon"
    assert "All metrics" in page
    assert "Validation accuracy" in page
    assert "McNemar" in page


def test_generated_texts_are_shown_and_an_absent_answer_is_wrong(tmp_path: Path) -> None:
    references = [str(k) for k in range(60)]
    for seed in (0, 1):
        for name, wrong in (("adamw", 30), ("muon", 5)):
            given = [None if k < wrong else references[k] for k in range(60)]
            texts = [f"#### none {k}" if k < wrong else f"so {k}" for k in range(60)]
            own = Answers("exact_match", references, given, texts=texts)
            synthetic.write(tmp_path, Recipe(name, seed=seed, has_moments=False, answers=own))
    document = judge_folder(tmp_path)
    comparison = only(document)
    (row, *_) = example_tables.changed(comparison).rows
    assert row == ["muon", "adamw", "5", "5", "(none)", "#### none 5"]
    assert comparison.arms[1].final.mean == pytest.approx(55 / 60)
    assert "val loss (nats/token)" in [column.head for column in document.sets[0].table.columns]


def test_a_correlation_is_resampled_and_has_no_right_or_wrong(tmp_path: Path) -> None:
    truth = np.random.default_rng(1).uniform(0, 5, 120)
    for index, (name, noise) in enumerate((("adamw", 2.0), ("muon", 0.3))):
        for seed in (0, 1, 2):
            guess = truth + noise * np.random.default_rng([index, seed]).normal(size=120)
            own = Answers("spearman", [repr(float(v)) for v in truth], [repr(float(v)) for v in guess])
            synthetic.write(tmp_path, Recipe(name, seed=seed, has_moments=False, answers=own))
    document = judge_folder(tmp_path)
    (judged,) = document.sets
    assert (judged.verdict.kind, judged.verdict.winner) == ("winner", "muon")
    assert judged.comparison.examples is not None
    assert judged.comparison.examples.mcnemar(0, 1) == []
    assert example_tables.agreement(judged.comparison).rows == []
    assert not {"other_predictions", "no_examples"} & {warning.code for warning in judged.warnings}


def codes(document: Document) -> dict[str, str]:
    return {warning.code: warning.message for judged in document.sets for warning in judged.warnings}


def test_runs_without_predictions_get_no_winner(tmp_path: Path) -> None:
    write(tmp_path, {"adamw": 0.5, "muon": 0.95}, seeds=3)
    (tmp_path / "muon-seed1" / "predictions.parquet").unlink()
    document = judge_folder(tmp_path)
    assert document.sets[0].verdict.kind == "withheld"
    assert "1 of 6 runs have no readable predictions.parquet" in document.sets[0].verdict.headline
    assert "no_examples" in codes(document)


def test_damaged_predictions_are_a_note_and_no_end_of_the_report(tmp_path: Path) -> None:
    write(tmp_path, {"adamw": 0.5, "muon": 0.95}, seeds=2)
    (tmp_path / "muon-seed1" / "predictions.parquet").write_bytes(b"PAR1 no")
    document = judge_folder(tmp_path)
    assert any("predictions.parquet cannot be read" in note for run in document.runs for note in run.notes)
    assert document.sets[0].verdict.kind == "withheld"


def test_different_examples_are_not_paired(tmp_path: Path) -> None:
    write(tmp_path, {"adamw": 0.7}, seeds=2)
    write(tmp_path, {"muon": 0.7}, seeds=2, examples=200)
    assert "were evaluated on different examples" in codes(judge_folder(tmp_path))["no_examples"]


def test_what_the_examples_cannot_show_is_warned_of(tmp_path: Path) -> None:
    """Equal counts of right answers; one optimizer predicts one class; a summary that says something else."""
    truth = [LABELS[k % 2] for k in range(100)]
    worse = truth[:60] + [LABELS[(k + 1) % 2] for k in range(60, 100)]
    for seed in (0, 1):
        for name, guess in (("adamw", worse), ("muon", list(worse)), ("sumo", ["yes"] * 100)):
            own = Answers("accuracy", truth, guess, LABELS)
            summary = {"val/loss": 0.4} if name == "adamw" else {}
            synthetic.write(
                tmp_path, Recipe(name, seed=seed, has_moments=False, answers=own, summary=summary)
            )
    path = tmp_path / "adamw-seed0" / "summary.json"
    content = json.loads(path.read_text())
    content["metrics"]["accuracy"]["value"] = 0.75
    path.write_text(json.dumps(content))
    found = codes(judge_folder(tmp_path))
    assert "one class, yes, is predicted for all 100 examples" in found["constant_prediction"]
    assert found["other_predictions"].startswith("adamw-seed0: ")
    content["metrics"]["accuracy"]["value"] = 0.604
    (tmp_path / "adamw-seed0" / "summary.json").write_text(json.dumps(content))
    assert (
        "differ by 0.20 points, less than one of the 100"
        in codes(judge_folder(tmp_path))["below_one_example"]
    )


def test_settings_selected_on_the_same_examples_are_warned_of(tmp_path: Path) -> None:
    from analysis.runs import tuning_ledger

    write(tmp_path, {"adamw": 0.7, "muon": 0.7}, seeds=2)
    identities = [
        json.loads(path.read_text())["identity"] for path in sorted(tmp_path.glob("muon*/summary.json"))
    ]
    trial = tuning_ledger.Trial(1, {"lr": 0.1}, "finished", "", 0.4, 10.0, "muon-trial1", "x")
    arm = tuning_ledger.TunedArm("muon", "muon", {"lr": "ladder"}, (trial,), 1, {}, 7, tuple(identities))
    (tmp_path / tuning_ledger.FILE).write_text(json.dumps({"arms": tuning_ledger.to_json([arm])}))
    document = judge_folder(tmp_path)
    assert (
        "The settings of muon were selected on the same validation examples"
        in codes(document)["tuned_on_validation"]
    )


def test_a_run_of_a_task_that_stopped_counts_as_unfinished(tmp_path: Path) -> None:
    write(tmp_path, {"adamw": 0.6, "muon": 0.9}, seeds=3)
    stopped = Recipe("sumo", 0, state="diverged", stop_at=60, has_moments=False, answers=answers(0.5, 3, 0))
    synthetic.write(tmp_path, stopped)
    document = judge_folder(tmp_path)
    comparison = only(document)
    assert comparison.measure.name == "accuracy"
    assert "1 of 7 runs did not finish" in document.sets[0].verdict.headline
    assert [row.failed for row in document.sets[0].table.rows] == [False, False, False, True]
