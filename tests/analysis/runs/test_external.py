"""Runs of other trainers, from tables written by hand: what is read, what is not, and that both are said."""

import json
import math
import re
from pathlib import Path

import pytest

from analysis.comparison import document
from analysis.report import report_page
from analysis.runs import external
from analysis.runs.loading import load
from analysis.runs.run import LoadedRun
from harness.record import tables
from harness.record.schema import METRICS, SUMMARY_KEYS
from tests.analysis import synthetic

CSV = """\
optimizer,seed,step,tokens,seconds,val_loss,train/loss,lr,comparison_key,steps_planned,state_bytes.moment,lr_tuned
soap,0,100,204800,10.5,5.5,5.6,0.003,KEY,200,,
soap,0,200,409600,21.0,3.25,3.3,0.0003,KEY,200,1048576,false
soap,1,100,204800,10.4,5.4,5.5,0.003,KEY,200,,
soap,1,200,409600,20.8,3.27,3.3,0.0003,KEY,200,1048576,false
"""


def by_seed(root: Path) -> dict[int, LoadedRun]:
    return {run.seed: run for run in load(root) if run.is_external}


def test_a_csv_holds_several_runs(tmp_path: Path) -> None:
    (tmp_path / "theirs.csv").write_text(CSV)
    runs = by_seed(tmp_path)
    assert sorted(runs) == [0, 1]
    run = runs[0]
    assert (run.optimizer, run.state, run.final_loss, run.comparison_key) == ("soap", "finished", 3.25, "KEY")
    assert run.metrics["step"].tolist() == [100, 200]
    assert run.metrics["wall_s"].tolist() == [10.5, 21.0]
    assert run.metrics["train/loss"].tolist() == [5.6, 3.3]
    assert run.fact("lr") == 0.003, "the peak of the column"
    assert run.fact("state_bytes", "moment") == 1048576
    assert run.summary["lr_tuned"] is False
    assert (run.fact("tokens"), run.fact("wall_s"), run.steps) == (409600, 21.0, 200)
    assert run.notes == []


def test_a_jsonl_holds_the_same_with_facts_in_a_row_of_their_own(tmp_path: Path) -> None:
    lines = [
        {
            "optimizer": "soap",
            "seed": 0,
            "comparison_key": "KEY",
            "steps_planned": 200,
            "state_bytes": {"moment": 1048576},
        },
        {"optimizer": "soap", "seed": 0, "step": 200, "val/loss": 3.25},
        {"optimizer": "soap", "seed": 0, "step": 100, "train/loss": 5.6},
        {"optimizer": "soap", "seed": 0, "step": 100, "val/loss": 5.5},
    ]
    (tmp_path / "theirs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = by_seed(tmp_path)[0]
    assert (run.final_loss, run.state) == (3.25, "finished")
    assert run.metrics["step"].tolist() == [100, 200], "sorted, and two rows of a step are one"
    assert run.metrics["val/loss"].tolist() == [5.5, 3.25]
    assert run.fact("state_bytes", "moment") == 1048576
    assert run.notes == []


def test_they_stand_beside_our_runs_in_one_table(tmp_path: Path) -> None:
    synthetic.group(tmp_path, ["adamw", "sumo"], [0, 1])
    key = load(tmp_path)[0].comparison_key
    (tmp_path / "theirs.csv").write_text(CSV.replace("KEY", key))
    (judged,) = document.judge_folder(tmp_path).sets
    assert [arm.label for arm in judged.comparison.arms] == ["adamw", "soap", "sumo"]
    assert judged.comparison.tests.n.tolist() == [2, 2, 2]
    row = next(row for row in judged.table.rows if row.cells["optimizer"].text == "soap")
    assert row.cells["loss"].value == pytest.approx(3.26)
    assert row.cells["state"].value == 1.0
    assert row.cells["certificate"].text == "none"
    codes = {c.code for c in judged.warnings}
    assert {"foreign", "uncertified"} <= codes
    assert "Read from tables of other trainers: soap (seeds 0 and 1)." in report_page.render(
        document.judge_folder(tmp_path)
    )


def test_without_a_key_they_are_compared_with_nothing_else(tmp_path: Path) -> None:
    synthetic.group(tmp_path, ["adamw"], [0, 1])
    (tmp_path / "theirs.csv").write_text(CSV.replace("comparison_key", "comparison").replace("KEY", ""))
    assert len(document.judge_folder(tmp_path).sets) == 2


BAD_CSV = """\
optimizer;seed;step;val/loss;colour
soap;0;1;8.0;red
soap;0;two;7.0;red
soap;0;3;abc;red
soap;x;4;6.0;red
soap;-1;4;6.0;red
soap;0;4;6.0
soap;0;5;nan;red
soap;0;5.0;5.0;red
soap;0;6;
"""


def test_bad_rows_of_a_csv_are_left_out_and_said(tmp_path: Path) -> None:
    (tmp_path / "bad.csv").write_text(BAD_CSV)
    run = by_seed(tmp_path)[0]
    assert run.metrics["step"].tolist() == [1, 3, 5]
    assert run.metrics["val/loss"][[0, 2]].tolist() == [8.0, 5.0]
    assert math.isnan(run.metrics["val/loss"][1])
    said = " | ".join(run.notes)
    assert "unused columns: colour" in said
    assert "1 step logged twice" in said
    # The reader complains of shape first, then of contents, each with its line.
    for part in (
        "line 7: 4 cells, the header has 5",
        "line 10: 4 cells",
        "line 3: step 'two'",
        "line 4: val/loss 'abc'",
    ):
        assert part in said
    assert "2 more such lines" in said


def test_a_row_that_is_left_out_tells_nothing_of_its_run(tmp_path: Path) -> None:
    text = (
        "optimizer,seed,step,val/loss,comparison_key,steps_planned\nsoap,0,9,3.0,k,9\nsoap,0,x,3.0,other,99\n"
    )
    (tmp_path / "t.csv").write_text(text)
    run = by_seed(tmp_path)[0]
    assert (run.comparison_key, run.state) == ("k", "finished")


BAD_JSONL = """\
{"optimizer": "soap", "seed": 0, "step": 1, "val/loss": 8.0, "steps_planned": "many"}
not json
[1, 2]
{"optimizer": "soap", "seed": 0, "step": null, "val/loss": 7.0}
{"optimizer": "soap", "seed": 0, "step": 2, "val/loss": "7"}
{"optimizer": "soap", "seed": 1.5, "step": 2, "val/loss": 7}
{"optimizer": "soap", "seed": 0, "step": 3, "val/loss": null, "lr_tuned": "perhaps"}
{"optimizer": "soap", "seed": 0, "step": 4, "val/lo"""


def test_bad_rows_of_a_jsonl_are_left_out_and_said(tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text(BAD_JSONL)
    run = by_seed(tmp_path)[0]
    assert run.metrics["step"].tolist() == [1, 2, 3]
    assert run.metrics["val/loss"][:2].tolist() == [8.0, 7.0]
    assert (run.state, run.reason) == ("diverged", "the loss is not finite at step 3")
    said = " | ".join(run.notes)
    for part in (
        "line 2: not JSON",
        "line 3: not an object",
        "line 8: not JSON (cut off",
        "line 1: steps_planned 'many'",
    ):
        assert part in said
    assert "3 more such lines" in said


@pytest.mark.parametrize(
    ("rows", "state", "reason"),
    [
        ("0,100,3.0,200", "interrupted", "ends at step 100 of 200"),
        ("0,200,inf,200", "diverged", "not finite at step 200"),
        (
            "0,100,3.0,\n0,200,,",
            "failed",
            "no validation loss at its last step 200 (the last one is at step 100)",
        ),
        ("0,200,,", "failed", "no finite validation loss"),
    ],
)
def test_what_became_of_a_run_is_read_off_its_table(
    tmp_path: Path, rows: str, state: str, reason: str
) -> None:
    # One finite loss before tells a divergence from a loss that was never there.
    head = "0,50,4.0,\n" if "inf" in rows else ""
    (tmp_path / "soap.csv").write_text(f"seed,step,val/loss,steps_planned\n{head}{rows}\n")
    run = by_seed(tmp_path)[0]
    assert run.state == state
    assert reason in run.reason
    assert not run.finished


def test_the_state_may_be_told_and_must_be_known(tmp_path: Path) -> None:
    text = "optimizer,seed,step,val/loss,state\na,0,9,3.0,failed\nb,0,9,3.0,gone\n"
    (tmp_path / "t.csv").write_text(text)
    states = {run.optimizer: run for run in load(tmp_path)}
    assert [states[name].state for name in "ab"] == ["failed", "failed"]
    assert "unknown state gone" in states["b"].reason


def test_a_file_name_may_tell_optimizer_and_seed(tmp_path: Path) -> None:
    for name in ("soap-seed3.csv", "lion.csv"):
        (tmp_path / name).write_text("step,val/loss\n1,5.0\n2,4.0\n")
    found = {(run.optimizer, run.seed, run.final_loss) for run in load(tmp_path)}
    assert found == {("soap", 3, 4.0), ("lion", 0, 4.0)}


def test_options_make_arms_of_their_own(tmp_path: Path) -> None:
    text = "optimizer,seed,step,val/loss,optimizer.rank,comparison_key\n"
    rows = [f"soap,{seed},9,3.{rank},{rank},k" for rank in (8, 16) for seed in (0, 1)]
    for rank in (8, 16):
        mine = [row for row in rows if f",{rank},k" in row]
        (tmp_path / f"r{rank}.csv").write_text(text + "\n".join(mine) + "\n")
    (judged,) = document.judge_folder(tmp_path).sets
    assert [arm.label for arm in judged.comparison.arms] == ["soap (rank=16)", "soap (rank=8)"]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("notes.csv", "a,b\n1,2\n", "no column step"),
        ("empty.csv", "", "no column step"),
        ("empty.jsonl", "\n\n", "no column step"),
        ("words.jsonl", "hello\n", "line 1: not JSON"),
        ("head.csv", "optimizer,seed,step,val/loss\n", "no column step|holds no run"),
        ("seedless.csv", "optimizer,seed,step,val/loss\na,x,1,2\n", "holds no run: line 2: seed 'x'"),
        ("binary.csv", "\x00\x01\n\x00", "no column step"),
    ],
)
def test_a_table_that_is_none_is_said_and_the_rest_is_shown(
    tmp_path: Path, name: str, content: str, said: str
) -> None:
    synthetic.group(tmp_path, ["adamw"], [0, 1])
    (tmp_path / name).write_text(content)
    found = document.judge_folder(tmp_path)
    assert len(found.runs) == 2
    (remark,) = found.remarks
    assert remark.startswith(name)
    assert re.search(said, remark)
    warnings = document.to_json(found)["warnings"]
    assert {"set": None, "code": "remark", "message": remark, "grave": True} in warnings
    assert name in report_page.render(found)


def test_our_own_tables_and_run_folders_are_not_taken_for_theirs(tmp_path: Path) -> None:
    synthetic.group(tmp_path, ["adamw"], [0])
    (tmp_path / "comparison.csv").write_text("set,optimizer\n")
    (tmp_path / "adamw-seed0" / "extra.csv").write_text(CSV)
    found = document.judge_folder(tmp_path)
    assert (len(found.runs), found.remarks) == (1, [])


def test_a_byte_order_mark_is_no_letter(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(
        "\ufeffoptimizer\tseed\tstep\tval/loss\nsoap\t0\t1\t3.0\n", encoding="utf-8"
    )
    assert by_seed(tmp_path)[0].final_loss == 3.0


def test_the_facts_are_those_of_a_summary() -> None:
    facts = {*external.TEXTS, *external.NUMBERS, *external.FLAGS, *external.NESTED}
    assert facts <= set(SUMMARY_KEYS)
    assert set(tables.ALIASES.values()) <= set(METRICS)


def test_the_documentation_names_every_key() -> None:
    text = (Path(__file__).parents[3] / "docs" / "report.md").read_text()
    section = text[text.index("## Runs of other trainers") :]
    keys = [*external.TEXTS, *external.NAMES, *external.NUMBERS, *external.FLAGS, *tables.ALIASES]
    assert [key for key in (*keys, *external.NESTED) if f"`{key}" not in section] == []
