"""The column of `optbench memorize` in the results table: of these runs, or not shown."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest

from analysis.comparison import document, results_table
from analysis.comparison.memorization import FILE
from tests.analysis import synthetic

ARMS = ("adamw", "muon")


@pytest.fixture
def group(tmp_path: Path) -> Path:
    """Two arms, and what `optbench memorize` writes about them."""
    synthetic.group(tmp_path, ARMS, (0, 1))
    comparison = document.judge_folder(tmp_path).sets[0].comparison
    write(
        tmp_path,
        comparison_key=comparison.key,
        comparison=[
            entry(level, measure, base)
            for level, base in ((3.9, 1.0), (3.5, 2.0))
            for measure in ("exposure_1", "exposure_4", "auc")
        ],
        costs=[{"optimizer": arm.label, "final_val_loss": arm.final.mean} for arm in comparison.arms],
    )
    return tmp_path


def entry(level: float, measure: str, base: float) -> dict[str, Any]:
    base += 10.0 * ("1" not in measure)
    arms = [
        {"optimizer": name, "mean": base + i, "low": base + i - 0.25, "high": base + i + 0.25, "seeds": 2}
        for i, name in enumerate(ARMS)
    ]
    return {"val_loss": level, "measure": measure, "title": "any", "optimizers": arms}


def write(folder: Path, **content: Any) -> None:
    (folder / FILE).write_text(json.dumps(content))


def change(folder: Path, **values: Any) -> None:
    write(folder, **{**json.loads((folder / FILE).read_text()), **values})


def cells(found: document.Document) -> dict[str, str]:
    rows = found.sets[0].table.rows
    return {row.cells["optimizer"].text: row.cells["memorization"].text for row in rows if not row.failed}


def test_the_first_measure_at_the_lowest_loss_is_a_column_in_every_form(group: Path) -> None:
    found = document.judge_folder(group)
    assert cells(found) == {"adamw": "2.00 ± 0.25", "muon": "3.00 ± 0.25"}
    (judged,) = found.sets
    (column,) = [c for c in judged.table.columns if c.key == "memorization"]
    assert column.head == "exposure ×1 (bits at val loss 3.5000)"
    assert column.head in results_table.markdown([(judged.table, "")])
    lines = csv.DictReader(io.StringIO(results_table.to_csv([judged.table])))
    assert [line["memorization [bits at val loss 3.5000]"] for line in lines] == ["3", "2"]
    (in_json,) = document.to_json(found)["comparison"]["sets"]
    assert in_json["memorization"]["val_loss"] == 3.5
    assert in_json["memorization"]["means"]["muon"]["mean"] == 3.0
    assert not any("memor" in note for note in [*judged.table.notes, *found.remarks])


def test_runs_that_changed_since_are_not_shown(group: Path) -> None:
    path = group / "muon-seed1" / "summary.json"
    summary = json.loads(path.read_text())
    path.write_text(json.dumps(summary | {"val/loss": summary["val/loss"] + 1e-9}))
    found = document.judge_folder(group)
    assert cells(found) == {"adamw": "2.00 ± 0.25", "muon": "–"}
    (note,) = [note for note in found.sets[0].table.notes if FILE in note]
    assert note.startswith("memorization of muon is not shown: memorize.json is older than these runs")


def test_without_canaries_it_is_the_auc_and_one_seed_has_no_interval(group: Path) -> None:
    found = entry(3.5, "auc", 0.0)
    for arm in found["optimizers"]:
        arm |= {"low": None, "high": None}
    change(group, comparison=[found])
    judged = document.judge_folder(group)
    assert cells(judged) == {"adamw": "10.0", "muon": "11.0"}
    assert judged.sets[0].table.columns[-2].label == "membership AUC"


@pytest.mark.parametrize(
    ("values", "remark"),
    [
        ({"comparison_key": "another"}, "is of other runs; optbench memorize measures these"),
        ({"comparison": [{"val_loss": "<b>"}]}, "comparison.0.val_loss is missing or wrong"),
        ({"costs": None}, "costs is missing or wrong"),
    ],
)
def test_a_file_of_other_runs_or_no_such_file_is_named(group: Path, values: Any, remark: str) -> None:
    change(group, **values)
    found = document.judge_folder(group)
    assert any(line.startswith(f"{group.name}/{FILE}") and remark in line for line in found.remarks)
    assert "memorization" not in found.sets[0].table.rows[0].cells


def test_without_the_file_or_a_common_loss_there_is_no_column(group: Path) -> None:
    change(group, comparison=[])
    assert document.judge_folder(group).sets[0].comparison.memorization is None
    (group / FILE).unlink()
    found = document.judge_folder(group)
    assert found.sets[0].table.columns == results_table.COLUMNS
    assert document.to_json(found)["comparison"]["sets"][0]["memorization"] is None
