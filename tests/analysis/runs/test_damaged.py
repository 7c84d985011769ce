"""Whatever stands in the files of a run, the report is made, and the whole runs beside it stay as they were.

Values of every JSON file, of the configuration, of the rows and of the moments are replaced by junk of every type:
files of older and newer versions, of other programs, of a disk that was full.
"""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from rich.console import Console

from analysis.comparison import document, results_table
from analysis.report import report_page
from tests.analysis import synthetic
from tests.analysis.synthetic import TYPICAL, Recipe

JUNK: list[Any] = [None, True, -1, 0, 1.5, math.inf, math.nan, 10**400, "", "x", "ʎ <b>", [], [1, "a"], {}]
JUNK += [{"a": None}, {"a": {"b": [1]}}, [{"passed": "no"}], -(2**70), "nan", {"name": 3}, 1e-320]
FILES = ("summary.json", "status.json", "environment.json", "config.yaml")


def damage(value: Any, rng: np.random.Generator, share: float) -> Any:
    """``value`` with each of its parts, at any depth, replaced by junk with probability ``share``."""
    if rng.random() < share:
        return JUNK[rng.integers(len(JUNK))]
    if isinstance(value, dict):
        return {key: damage(entry, rng, share) for key, entry in value.items()}
    if isinstance(value, list):
        return [damage(entry, rng, share) for entry in value]
    return value


def rewrite(folder: Path, rng: np.random.Generator) -> None:
    for name in FILES:
        path = folder / name
        data = damage(yaml.safe_load(path.read_text()), rng, 0.15)
        # YAML holds what JSON's reader knows, infinities and large integers too.
        path.write_text(yaml.safe_dump(data) if name == "config.yaml" else json.dumps(data))
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(damage(row, rng, 0.1)) + "\n" for row in rows))
    parameters = json.loads((folder / "parameters.json").read_text())
    (folder / "parameters.json").write_text(json.dumps(damage(parameters, rng, 0.03)))
    frame = pd.read_parquet(folder / "moments.parquet")
    column = frame.columns[rng.integers(len(frame.columns))]
    frame[column] = [None, "x", math.inf][rng.integers(3)]
    frame.to_parquet(folder / "moments.parquet")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two arms with two whole runs each, and a run that each test damages."""
    synthetic.group(tmp_path, ["adamw", "sumo"], [0, 1], has_moments=False, log_every=50)
    synthetic.write(tmp_path, Recipe(**{**vars(TYPICAL["muon"]), "layers": 2}), "damaged")
    return tmp_path


@pytest.mark.parametrize("trial", range(12))
def test_junk_of_every_type_costs_no_report(root: Path, trial: int) -> None:
    whole = {run.where: run.final_loss for run in document.judge_folder(root).runs if run.where != "damaged"}
    rewrite(root / "damaged", np.random.default_rng(trial))
    found = document.judge_folder(root)
    assert {run.where: run.final_loss for run in found.runs if run.where != "damaged"} == whole
    assert len(found.runs) == 5
    assert report_page.render(found).rstrip().endswith("</html>")
    json.dumps(document.to_json(found), allow_nan=False)
    for judged in found.sets:
        results_table.print_table(judged.table, Console(file=io.StringIO(), width=120))
        results_table.markdown([(judged.table, judged.verdict.sentence)])
        results_table.to_csv([judged.table])


@pytest.mark.parametrize("name", ["summary.json", "metrics.jsonl", "config.yaml"])
@pytest.mark.parametrize("length", [0, 1, 40, -2])
def test_a_file_that_was_cut_anywhere_costs_no_report(root: Path, name: str, length: int) -> None:
    path = root / "damaged" / name
    path.write_bytes(path.read_bytes()[:length])
    found = document.judge_folder(root)
    assert len(found.runs) == 5
    assert report_page.render(found).rstrip().endswith("</html>")
    if name != "config.yaml" or length in (0, 1):  # YAML that lacks its last lines is YAML
        said = [note for run in found.runs for note in run.notes]
        assert any(name in note for note in said)
