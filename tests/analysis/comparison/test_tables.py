"""One table, three renderings: the same cells in each, failures among them."""

import csv
import io
import json
import math
from pathlib import Path

import pytest
from rich.console import Console

from analysis.comparison import document, results_table
from analysis.comparison.results_table import COLUMNS, ResultsTable
from tests.analysis import synthetic
from tests.analysis.synthetic import TYPICAL, Recipe


def table(root: Path) -> ResultsTable:
    (judged,) = document.judge_folder(root).sets
    return judged.table


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> ResultsTable:
    """Four arms with three seeds, and a fourth run of galore that diverged."""
    root = synthetic.group(tmp_path_factory.mktemp("mixed"))
    synthetic.write(
        root, Recipe(**{**vars(TYPICAL["galore"]), "seed": 3, "state": "diverged", "stop_at": 70})
    )
    return table(root)


def test_rows_stand_by_mean_loss_with_failures_below_their_arm(mixed: ResultsTable) -> None:
    names = [row.cells["optimizer"].text for row in mixed.rows]
    assert names == ["sumo", "muon", "adamw", "galore", "galore seed 3"]
    assert [row.failed for row in mixed.rows] == [False] * 4 + [True]
    assert mixed.rows[-1].cells["outcome"].text == "diverged at step 70"


@pytest.mark.parametrize("seeds", [[0], [0, 1, 2]])
def test_arms_are_ranked_by_loss_and_those_without_one_come_last(tmp_path: Path, seeds: list[int]) -> None:
    synthetic.group(tmp_path, ["adamw", "galore", "muon", "sumo"], seeds=seeds)
    synthetic.write(tmp_path, Recipe("aaa", state="diverged", stop_at=60))
    rows = [row for row in table(tmp_path).rows if not row.failed]
    assert [row.cells["optimizer"].text for row in rows] == ["sumo", "muon", "adamw", "galore", "aaa"]
    losses = [row.cells["loss"].value for row in rows[:-1]]
    assert losses == sorted(losses)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("source", "tuned", "standing"),
    [
        ("tuned at 1.8M, 300 steps", False, "default tuned at another size"),
        ("tuned at 60M on another corpus", False, "default tuned at another size"),
        ("tuned at 1.8M, 300 steps", True, "tuned default"),
        ("GaLore's published protocol, 60M", False, "untuned default"),
    ],
)
def test_what_is_said_of_a_learning_rate_agrees_with_its_source(
    tmp_path: Path, source: str, tuned: bool, standing: str
) -> None:
    synthetic.group(tmp_path, ["adamw", "sumo"], [0, 1], lr_source=source, lr_tuned=tuned)
    found = table(tmp_path)
    assert {row.cells["lr_standing"].text for row in found.rows} == {standing}
    everything = " ".join([results_table.markdown([(found, "")]), results_table.to_csv([found])])
    assert not ("untuned" in everything and "tuned at" in everything)


def test_figures_are_those_of_the_runs(mixed: ResultsTable) -> None:
    cells = mixed.rows[0].cells
    assert cells["state"].value == pytest.approx((1_300_000 + 900_000 + 4_200_000) / 2**20)
    assert cells["optimizer_ms"].value == pytest.approx(19.0)
    assert cells["step_ms"].value == pytest.approx(119.0), "probes (1 ms) are left out"
    assert cells["perplexity"].value == pytest.approx(math.exp(float(cells["loss"].value)))
    assert cells["n"].text == "3"


def test_optimizers_are_compared_by_the_peak_of_training_if_all_runs_have_it(tmp_path: Path) -> None:
    root = synthetic.group(tmp_path, ["adamw", "sumo"], [0, 1])
    paths = sorted(root.rglob("summary.json"))
    for path in paths:
        summary = json.loads(path.read_text())
        summary["memory_bytes"] |= {
            "training_peak": 300 * 2**20,
            "build_peak": 500 * 2**20,
            "peak": 500 * 2**20,
        }
        path.write_text(json.dumps(summary))
    assert {row.cells["peak"].value for row in table(tmp_path).rows} == {300}
    # A run from before that figure existed: then all are compared by the peak of the whole run.
    summary = json.loads(paths[0].read_text())
    del summary["memory_bytes"]["training_peak"]
    paths[0].write_text(json.dumps(summary))
    assert {row.cells["peak"].value for row in table(tmp_path).rows} == {500}


def test_the_target_is_the_worst_finishing_mean(mixed: ResultsTable) -> None:
    """The worst arm reaches it with its last step; a better one where its own closed-form curve does."""
    worst = mixed.rows[3].cells
    assert worst["steps_to_target"].value == pytest.approx(200)
    assert worst["seconds_to_target"].value == pytest.approx(24.0)
    sumo = mixed.rows[0].cells
    end, target = float(sumo["loss"].value), float(worst["loss"].value)
    # L(t) = e + (8.3 − e)·exp(−6t/200), where the mean final loss is e + (8.3 − e)·exp(−6).
    floor = (end - 8.3 * math.exp(-6)) / (1 - math.exp(-6))
    expected = -200 / 6 * math.log((target - floor) / (8.3 - floor))
    # Linear between evaluations 20 steps apart: the chord lies above the convex curve, so it is met later.
    assert expected <= float(sumo["steps_to_target"].value) <= expected + 5


def test_markdown_and_csv_hold_every_cell(mixed: ResultsTable) -> None:
    text = results_table.markdown([(mixed, "The verdict.")])
    rows = [line for line in text.splitlines() if line.startswith("|")][2:]
    shown = [[cell.strip() for cell in line.strip("|").split("|")] for line in rows]
    assert shown == [[row.cells[c.key].text for c in COLUMNS] for row in mixed.rows]
    assert "The verdict." in text
    parsed = list(csv.reader(io.StringIO(results_table.to_csv([mixed]))))
    assert len(parsed) == 1 + len(mixed.rows)
    for line, row in zip(parsed[1:], mixed.rows, strict=True):
        for text, column in zip(line[1:], COLUMNS, strict=True):
            value = row.cells[column.key].value
            assert (
                text == value
                if isinstance(value, str)
                else (float(text) == value if text else math.isnan(value))
            )


@pytest.mark.parametrize("width", [80, 110, 240])
def test_the_terminal_shows_every_number_at_any_width(mixed: ResultsTable, width: int) -> None:
    out = io.StringIO()
    results_table.print_table(mixed, Console(file=out, width=width))
    lines = out.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    words = out.getvalue().split()
    for row in mixed.rows:
        for column in COLUMNS:
            if column.numeric and not row.failed:
                assert set(row.cells[column.key].text.split()) <= set(words), column.key
    assert "diverged" in words


def test_names_of_markup_and_pipes_are_harmless(tmp_path: Path) -> None:
    synthetic.group(tmp_path, ["[red]x|y"], seeds=[0, 1])
    found = table(tmp_path)
    out = io.StringIO()
    results_table.print_table(found, Console(file=out, width=240))
    assert "[red]x|y" in out.getvalue()
    assert "[red]x\\|y" in results_table.markdown([(found, "")])
