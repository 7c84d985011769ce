"""Logs of nanochat and exports from W&B, in the forms that their projects publish."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from analysis.comparison import document
from analysis.runs.logs import loading
from analysis.runs.run import LoadedRun

NANOCHAT = """\
Tokens / micro-batch: 524,288
Total batch size 524,288 => gradient accumulation steps: 1
Step 00000 | Validation bpb: 3.2123
step 00000/21400 (0.00%) | loss: 11.090355 | lrm: 1.00 | dt: 31.00ms | tok/sec: 13,000 | total time: 0.00m
step 00001/21400 (0.00%) | loss: 10.5 | lrm: 1.00 | dt: 480.00ms | tok/sec: 1,092,000 | mfu: 48.00 | total time: 0.50m
Step 21400 | Validation bpb: 0.8142
"""


def load(root: Path, name: str) -> list[LoadedRun]:
    return loading.load(root, name, [], [])


def test_nanochat(tmp_path: Path) -> None:
    (tmp_path / "d20").mkdir()
    (tmp_path / "d20" / "speedrun.log").write_text(NANOCHAT)
    (run,) = load(tmp_path, "nanochat")
    assert run.state == "finished"
    assert run.measure.name == "bits_per_byte"
    assert run.final(run.measure) == 0.8142
    assert run.metrics["step"].tolist() == [0, 1, 21400]
    assert run.metrics["wall_s"][:2].tolist() == [0, 30]
    assert run.metrics["train/loss"][:2].tolist() == [11.090355, 10.5]
    assert run.metrics["tokens"][-1] == 21400 * 524288
    (judged,) = document.judge_folder(tmp_path, log_format="nanochat").sets
    assert "0.8142 bits/byte" in judged.verdict.headline


def test_a_nanochat_log_that_breaks_off(tmp_path: Path) -> None:
    (tmp_path / "d20.txt").write_text(NANOCHAT.rsplit("Step 21400", 1)[0])
    (run,) = load(tmp_path, "nanochat")
    assert (run.state, run.reason) == ("interrupted", "the log ends at step 1 of 21400")


def test_a_nanochat_file_of_two_runs_and_one_of_a_resumed_run(tmp_path: Path) -> None:
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "both.log").write_text(NANOCHAT + NANOCHAT.replace("0.8142", "0.9"))
    findings: list[loading.LogFinding] = []
    runs = loading.load(tmp_path / "two", "nanochat", [], findings, every_run=True)
    assert [run.final(run.measure) for run in runs] == [0.8142, 0.9]
    assert [finding.code for finding in findings] == ["several_runs"]

    again = NANOCHAT.splitlines(keepends=True)[-2:]
    (tmp_path / "resumed").mkdir()
    (tmp_path / "resumed" / "one.log").write_text(NANOCHAT + again[0] + again[1].replace("0.8142", "0.8"))
    (run,) = load(tmp_path / "resumed", "nanochat")
    assert run.final(run.measure) == 0.8
    assert any("goes on from step 1 after step 21400" in note for note in run.notes)


HISTORY = """\
_step,iter,_runtime,train/loss,val/loss,final-val/loss,tokens,lr
0,0,1.5,10.9,10.9,,0,0.0
1,100,11.5,5.1,,,51200,0.001
2,200,21.5,4.1,4.2,,102400,0.001
3,300,31.5,3.9,,4.0,153600,0.0001
"""


def test_history_as_csv_with_the_last_loss_in_its_own_column(tmp_path: Path) -> None:
    """As epfml's benchmark logs it: iter is the step, and the last evaluation is final-val/loss."""
    (tmp_path / "adamw.csv").write_text(HISTORY)
    (run,) = load(tmp_path, "wandb")
    assert run.metrics["step"].tolist() == [0, 100, 200, 300], "of the trainer, not of W&B's log"
    assert (run.final_loss, run.fact("tokens"), run.fact("wall_s"), run.fact("lr")) == (
        4.0,
        153600,
        31.5,
        0.001,
    )


def test_history_and_config_as_json(tmp_path: Path) -> None:
    """As marin's runs come out of the API: a nested configuration, and evaluations in eval/paloma/c4_en/loss."""
    rows = [
        {"_step": 0, "train/loss": 11.0},
        {"_step": 500, "train/loss": 3.6, "eval/paloma/c4_en/loss": 3.5, "eval/loss": 9.9},
        {"_step": 1000, "train/loss": 3.2, "eval/paloma/c4_en/loss": "NaN"},
    ]
    config = {
        "optimizer": {"value": {"type": "muon", "learning_rate": 0.004}},
        "trainer": {"value": {"seed": 3}},
    }
    for seed, value in ((3, "NaN"), (4, 3.1)):
        rows[-1]["eval/paloma/c4_en/loss"] = value
        config["trainer"]["value"] = {"seed": seed, "num_train_steps": 1000}
        (tmp_path / f"run{seed}.json").write_text(json.dumps({"config": config, "history": rows}))
    diverged, finished = load(tmp_path, "wandb")
    assert (diverged.state, finished.state) == ("diverged", "finished")
    assert (finished.optimizer, finished.seed, finished.has_seed, finished.final_loss) == (
        "muon",
        4,
        True,
        3.1,
    )
    assert finished.summary["settings"]["optimizer.learning_rate"] == 0.004
    assert any("not from eval/loss" in note for note in finished.notes)


@pytest.mark.parametrize(("last", "state"), [("NaN", "diverged"), (3.3, "finished"), ("n/a", "finished")])
def test_the_loss_of_a_summary_counts_where_the_history_was_thinned_out(
    last: str | float, state: str, tmp_path: Path
) -> None:
    """The control: a text that is no number says nothing."""
    run = {
        "config": {"optimizer": "muon", "num_train_steps": 500},
        "history": [{"_step": 0, "val/loss": 9.0}, {"_step": 500, "val/loss": 3.4}],
        "summary": {"_step": 500, "val/loss": last},
    }
    (tmp_path / "run.json").write_text(json.dumps(run))
    (loaded,) = load(tmp_path, "wandb")
    assert loaded.state == state
    if state == "finished":
        assert loaded.final_loss == (3.4 if last == "n/a" else last)


def test_a_step_that_is_logged_twice_with_another_loss_is_named(tmp_path: Path) -> None:
    lines = ["step,val_loss", "0,9.0", "100,3.4", "0,9.1", "100,3.2"]
    (tmp_path / "rows.csv").write_text("\n".join(lines))
    (run,) = load(tmp_path, "wandb")
    assert any("2 steps logged twice with another loss" in note for note in run.notes)
    (tmp_path / "rows.csv").write_text("\n".join([*lines[:3], *lines[1:3]]))
    (run,) = load(tmp_path, "wandb")
    assert not any("logged twice" in note for note in run.notes)


def test_seeds_that_an_export_states_pair(tmp_path: Path) -> None:
    lines = ["Name,optimizer,seed,step,val_loss"]
    for optimizer, end in (("adamw", 3.3), ("muon", 3.2)):
        for seed, shift in ((5, 0.0), (6, 0.2), (7, 0.1)):
            lines += [
                f"{optimizer}-{seed},{optimizer},{seed},{step},{end + shift + seed / 1e4}"
                for step in (50, 100)
            ]
    (tmp_path / "runs.csv").write_text("\n".join(lines))
    (only,) = document.to_json(document.judge_folder(tmp_path, log_format="wandb"))["comparison"]["sets"]
    assert only["seeds"] == [5, 6, 7]
    assert [pair["test"] for pair in only["pairs"]] == ["paired t"]


def _table(workloads: dict[str, dict[str, str]], gap: float = 0.2) -> str:
    """Three runs for each optimizer with model and data of its own; the second one ends lower by ``gap``."""
    lines = ["Name,optimizer,seed,step,val_loss,model,dataset"]
    for shift, (optimizer, workload) in enumerate(workloads.items()):
        for seed, noise in ((5, 0.0), (6, 0.02), (7, 0.01)):
            end = 3.3 - gap * shift + noise + seed * shift / 1e4
            lines += [
                f"{optimizer}-{seed},{optimizer},{seed},{step},{end},{workload['model']},{workload['dataset']}"
                for step in (50, 100)
            ]
    return "\n".join(lines)


SMALL, LARGE = {"model": "130m", "dataset": "fineweb"}, {"model": "1b", "dataset": "c4"}


def test_runs_on_other_models_and_data_are_not_compared(tmp_path: Path) -> None:
    """The control: on one workload the same losses name a winner."""
    kinds = []
    for name, workloads in (("one", [SMALL, SMALL]), ("two", [SMALL, LARGE])):
        (tmp_path / name).mkdir()
        (tmp_path / name / "runs.csv").write_text(
            _table(dict(zip(("adamw", "muon"), workloads, strict=True)))
        )
        found = document.judge_folder(tmp_path / name, log_format="wandb")
        kinds.append([judged.verdict.kind for judged in found.sets])
    assert kinds == [["winner"], ["one_arm", "one_arm"]]
    assert ["130m" in judged.comparison.title for judged in found.sets].count(True) == 1
    assert "no conclusion is drawn across sets" in found.sentence


def test_no_verdict_where_model_or_data_are_not_stated(tmp_path: Path) -> None:
    text = _table({key: {"model": "130m", "dataset": ""} for key in ("adamw", "muon")})
    (tmp_path / "runs.csv").write_text(text)
    (judged,) = document.judge_folder(tmp_path, log_format="wandb").sets
    assert judged.verdict.kind == "withheld"
    assert "the logs do not state their data" in judged.verdict.headline
    (warning,) = (warning for warning in judged.warnings if warning.code == "unknown_workload")
    assert warning.severe


def test_workloads_of_an_export_are_those_of_the_profiles(tmp_path: Path) -> None:
    """Configurations with numbers of layers in place of a name of the model."""
    for layers in (4, 8):
        for optimizer, rate in (("adamw", 1.0), ("muon", 2.0)):
            config = {
                "optimizer": {"type": optimizer},
                "model": {"num_layers": layers},
                "data": {"name": "c4"},
            }
            history = [{"step": step, "val/loss": 5 - rate * step / 100} for step in (0, 50, 100)]
            path = tmp_path / f"{optimizer}{layers}.json"
            path.write_text(json.dumps({"config": config, "history": history}))
    found = document.to_json(document.judge_folder(tmp_path, log_format="wandb"))["comparison"]["profiles"]
    assert [sorted(row["ratios"]) for row in found["submissions"]] == [
        pytest.approx([2, 2]),
        pytest.approx([1, 1]),
    ]
    assert sorted("num_layers=8" in title for title in found["workloads"]) == [False, True]


def test_a_panels_csv_has_a_column_for_each_run(tmp_path: Path) -> None:
    text = (
        '"Step","sumo-1 - val/loss","sumo-1 - val/loss__MIN","sumo-1 - val/loss__MAX","sumo-2 - val/loss"\n'
    )
    text += '"100","5.5","5.4","5.6","5.7"\n"200","4.5","4.5","4.5",""\n"300","","","","4.9"\n'
    (tmp_path / "sumo").mkdir()
    (tmp_path / "sumo" / "panel.csv").write_text(text)
    first, second = load(tmp_path, "wandb")
    assert (first.where, first.final_loss) == ("sumo/panel.csv (sumo-1)", 4.5)
    assert second.metrics["step"].tolist() == [100, 300]


def test_summary_of_epfmls_benchmark(tmp_path: Path) -> None:
    history = [{"iter": 256, "tokens": 100, "val_loss": 5.6}, {"iter": 512, "tokens": 200, "val_loss": 5.1}]
    arguments = {"opt": "soap", "seed": 1, "lr": 0.001, "iterations": 512, "data_seed": 9}
    (tmp_path / "summary.json").write_text(
        json.dumps({"eval_history": history, "args": arguments, "val_loss": [5.6]})
    )
    (run,) = load(tmp_path, "wandb")
    assert (run.optimizer, run.seed, run.final_loss, run.state) == ("soap", 1, 5.1, "finished")
    assert "data_seed" not in run.summary["settings"]


def test_a_table_without_losses_or_steps_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("Name,accuracy\nx,0.5\n")
    (tmp_path / "b.json").write_text("{broken")
    remarks: list[str] = []
    assert loading.load(tmp_path, "wandb", remarks, []) == []
    assert len(remarks) == 2


@pytest.mark.parametrize("text", ["inf", "nan"])
def test_a_loss_that_is_not_finite(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.csv").write_text(f"step,val/loss\n1,3.0\n2,{text}\n")
    (run,) = load(tmp_path, "wandb")
    assert run.state == "diverged"
    assert math.isnan(run.final_loss)


def run_info(bpb: float | None, seed_like: float = 1.0, **changes: object) -> dict[str, object]:
    """A run in the form of marin's speedrun_results.json, with the keys that matter."""
    info: dict[str, object] = {
        "author": {"name": "A. Nonymous"},
        "eval/paloma/c4_en/bpb": bpb,
        "model_config": {"hidden_dim": 512, "num_layers": 6, "seq_len": 4096, "tokenizer": None},
        "model_size": 154153472,
        "resources": {"tpu_type": "v5litepod-64"},
        "tokenized_dataset": "gs://bucket-eu/tokenized/subcache/fineweb-edu-10B-6fbcbb",
        "total_tokens": 2599944192,
        "train_config": {
            "learning_rate": 0.02,
            "num_train_steps": 4959,
            "train_batch_size": 128,
            "data_seed": None,
            "optimizer_config": {"beta1": 0.9, "epsilon": 1e-20, "decay": None},
        },
        "training_time": 895.0 + seed_like,
    }
    return {"run_info": {**info, **changes}}


def test_marins_results_have_the_last_evaluation_only(tmp_path: Path) -> None:
    for arm, values in {"adamh": [1.177, 1.179], "muon": [1.160]}.items():
        (tmp_path / arm).mkdir()
        runs = [run_info(value, i) for i, value in enumerate(values)]
        (tmp_path / arm / "speedrun_results.json").write_text(json.dumps({"runs": runs}))
    elsewhere = {"tokenized_dataset": "/scratch/tokenized/fineweb-edu-10B-6fbcbb/"}
    (tmp_path / "muon" / "again.json").write_text(json.dumps({"runs": [run_info(1.162, 9, **elsewhere)]}))
    runs = load(tmp_path, "wandb")
    assert [run.final(run.measure) for run in runs] == [1.177, 1.179, 1.162, 1.160]
    assert {run.measure.name for run in runs} == {"bits_per_byte"}
    first = runs[0]
    assert (first.state, first.metrics["step"].tolist()) == ("finished", [4959])
    assert (first.metrics["tokens"][0], first.metrics["wall_s"][0]) == (2599944192, 895.0)
    assert "the export has only the last evaluation: there is no curve" in first.notes
    (judged,) = document.judge_folder(tmp_path, log_format="wandb").sets
    assert [arm.label for arm in judged.comparison.arms] == ["adamh", "muon"], (
        "one workload, wherever the data are"
    )
    assert not judged.comparison.tests.paired


def test_marins_results_of_another_tokenization_or_without_a_figure(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    other = {"tokenized_dataset": "gs://bucket/fineweb-edu-10B-ac65f6"}
    (tmp_path / "a" / "x.json").write_text(json.dumps({"runs": [run_info(1.1), run_info(1.2, 2, **other)]}))
    assert len(document.judge_folder(tmp_path, log_format="wandb").sets) == 2
    (tmp_path / "a" / "x.json").write_text(json.dumps({"runs": [run_info(None)]}))
    remarks: list[str] = []
    assert loading.load(tmp_path, "wandb", remarks, []) == []
    assert any("x.json" in remark for remark in remarks)


def test_a_summary_without_history(tmp_path: Path) -> None:
    config = {"model": {"hidden_dim": 8}, "data": "c4", "seed": 3, "optimizer": {"type": "muon"}}
    summary = {"_step": 99, "eval/loss": 3.25, "train/loss": 3.1, "_runtime": 12.0}
    (tmp_path / "tracker_metrics.jsonl").write_text(json.dumps({"config": config, "summary": summary}) + "\n")
    (run,) = load(tmp_path, "wandb")
    assert (run.optimizer, run.seed, run.final_loss, run.steps) == ("muon", 3, 3.25, 99)
    summary["eval/loss"] = "NaN"
    (tmp_path / "tracker_metrics.jsonl").write_text(json.dumps({"config": config, "summary": summary}) + "\n")
    (run,) = load(tmp_path, "wandb")
    assert run.state == "diverged"
