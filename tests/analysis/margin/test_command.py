"""`optbench margin` from its words to its exit codes, JSON and files."""

from __future__ import annotations

import csv
import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from analysis.margin import command
from analysis.margin.config import MarginConfig, load
from harness import cli
from harness.config import sources
from harness.config.typed_keys import keys_of
from harness.errors import InputError
from tests.harness.record import wandb_file

OFF = "wandb.mode=disabled"


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def answer(capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> dict[str, Any]:
    """The JSON document of a job."""
    assert command.main([*words, OFF, "--json"]) == code
    return json.loads(capsys.readouterr().out)


def test_the_document_of_steps(capsys: pytest.CaptureFixture[str]) -> None:
    found = answer(capsys, "w=2,-0.5", "b=0,0", "optimizer=gd,sign", "steps=10000")
    assert found["schema_version"] == 1
    first, second = found["runs"]
    assert (first["optimizer"], first["status"], first["C_predicted"]) == ("gd", "ok", 0.75)
    assert (second["optimizer"], second["rate_class"], second["C_fit"]) == ("sign", "zero", None)
    rows = {row["t"]: row for row in first["trajectory"]}
    assert rows[10_000]["gap"] == pytest.approx(0.1224872910, abs=1e-8)
    assert rows[10_000]["margin"] == pytest.approx(1.0 - 0.1224872910, abs=1e-8)
    assert rows[10_000]["ln_tau"] == pytest.approx(math.log(100.0))
    assert set(rows[1]) == {"t", "ln_tau", "gap", "margin"}
    assert {1.0, 10.0, 100.0, 1000.0, 10_000.0} <= set(rows)


def test_the_document_of_flow_with_a_join(capsys: pytest.CaptureFixture[str]) -> None:
    found = answer(capsys, "mode=flow", "w=[2,-0.5]", "join_at=1000", "ln_tau_max=69.08")
    (run,) = found["runs"]
    assert (run["rate_class"], run["status"]) == ("log", "ok")
    assert run["C_fit"] == pytest.approx(run["C_predicted"], rel=1e-3)
    assert run["join"]["passed"]
    assert run["join"]["gap_flow"] == pytest.approx(run["join"]["gap_steps"], rel=1e-3)
    log_taus = [row["ln_tau"] for row in run["trajectory"]]
    assert log_taus == sorted(log_taus)
    assert log_taus[-1] == 69.08
    by_t = {row["t"]: row["gap"] for row in run["trajectory"]}
    assert by_t[1000.0] == pytest.approx(0.1408002738, abs=1e-8)
    assert by_t[1e6] == pytest.approx(0.0716688751, abs=1e-7)


def test_gradient_descent_alone_goes_on_by_flow() -> None:
    assert (load([]).mode, load([]).join_at) == ("flow", 100_000)
    assert (load(["runs=7"]).mode, load(["runs=7"]).join_at) == ("flow", None)
    assert load(["join_at=1000"]).join_at == 1000
    for words in (["steps=5"], ["optimizer=gd,sign"], ["dtype=float32"]):
        assert load(words).mode == "toy"


def test_the_page_shows_the_law(capsys: pytest.CaptureFixture[str]) -> None:
    """1/gap from the largest gap on, with predicted and fitted constant: the start, at the optimum, is left out."""
    found = answer(capsys, "join_at=1000", "ln_tau_max=69.08", "--out", "here")
    fitted = found["runs"][0]["C_fit"]
    assert fitted == pytest.approx(0.75, rel=1e-3)
    assert found["sentence"] == f"gd: the gap closes as C/ln t, C = 0.75 predicted and {fitted:.5g} fitted."
    page = Path("here/report.html").read_text()
    (block,) = re.findall(r'<script type="application/json" class="figures">(.*?)</script>', page, re.S)
    shown = json.loads(block)["margin-inverse-gap"]["figure"]
    curve, law = shown["data"]
    assert law["name"] == f"slope 1/C, C = 0.75 predicted, fitted {fitted:.4g}"
    last = 1.0 / found["runs"][0]["trajectory"][-1]["gap"]
    assert curve["y"][-1] == pytest.approx(last)
    assert curve["y"] == sorted(curve["y"])
    low, high = shown["layout"]["yaxis"]["range"]
    assert (low, high) == (0.0, pytest.approx(1.15 * last))
    # What was wrong: a range that the start at the optimum blew up, in which the law lies at 0.
    first = 1.0 / found["runs"][0]["trajectory"][0]["gap"]
    assert first > 5.0 * high
    ends = (law["y"][1] - law["y"][0]) / math.log(law["x"][1] / law["x"][0])
    assert ends == pytest.approx(1.0 / 0.75)


def test_a_join_that_fails_is_the_answer_no(capsys: pytest.CaptureFixture[str]) -> None:
    """Ten steps of 1 from a start whose neurons are on at both points: gradient descent is not near its flow."""
    words = ["mode=flow", "w=1,-0.62", "b=1.82,1.32", "join_at=10", "ln_tau_max=10"]
    found = answer(capsys, *words, "lr=1", code=1)
    assert not found["runs"][0]["join"]["passed"]
    assert any("disagree" in note for note in found["notes"])
    assert answer(capsys, *words[:3], "lr=0.01", "join_at=1000", "ln_tau_max=10")["runs"][0]["join"]["passed"]


def test_random_starts_are_counted(capsys: pytest.CaptureFixture[str]) -> None:
    found = answer(capsys, "runs=40", "steps=10000", "seed=42", "record=1")
    w = np.random.default_rng(42).normal(0.0, math.sqrt(2.0), (40, 2))
    alive = set(np.flatnonzero((w[:, 0] > 0) & (w[:, 1] < 0)).tolist())
    assert {run["run"] for run in found["runs"] if run["status"] == "ok"} == alive
    assert found["counts"]["gd"] == {"ok": len(alive), "dead": 40 - len(alive)}
    (row,) = found["table"]
    oracle = stats.binomtest(len(alive), 40).proportion_ci(0.95)
    assert (row["separated"], row["separated low"]) == pytest.approx((len(alive) / 40, oracle.low))
    at_1e4 = row["gap at step 10,000"]
    gaps = [r["trajectory"][-1]["gap"] for r in found["runs"] if r["status"] == "ok"]
    assert at_1e4 == pytest.approx(float(np.median(gaps)))


def test_all_dead_is_the_answer_no(capsys: pytest.CaptureFixture[str]) -> None:
    w = np.random.default_rng(4).normal(0.0, math.sqrt(2.0), (2, 2))
    assert not ((w[:, 0] > 0) & (w[:, 1] < 0)).any()
    found = answer(capsys, "runs=2", "seed=4", "steps=10000", "record=1", code=1)
    assert [run["status"] for run in found["runs"]] == ["dead", "dead"]


def test_divergence_is_a_failure(capsys: pytest.CaptureFixture[str]) -> None:
    """The point 1 is far on the wrong side: e^11 times 1e308 overflows."""
    found = answer(capsys, "w=0.1,5", "b=0,6", "lr=1e308", "steps=50", code=3)
    assert found["runs"][0]["status"] == "diverged"


def test_float32_runs_and_refuses_a_rate_past_the_flag(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["dtype=float32", "lr=1", "w=2000,-2000", "b=-1996,-1995", "steps=30000", "record=2"]
    found = answer(capsys, *words)
    (run,) = found["runs"]
    assert run["stagnated_at"] is not None
    assert run["stagnated_at"] <= 30_000
    assert any("last place" in note for note in found["notes"])
    window = run["rate"]["window"]
    assert window is None or window[1] <= math.log(run["stagnated_at"])


def test_files_and_the_table_for_people(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert command.main(["optimizer=gd,muon", "steps=1000", OFF, "--out", "here"]) == 0
    out = capsys.readouterr().out
    folder = tmp_path / "here"
    names = {path.name for path in folder.iterdir()}
    assert names == {"trajectory.csv", "table.csv", "table.md", "summary.json", "report.html"}
    assert "| optimizer | gd | muon |" in out
    assert str(Path("here") / "report.html") in out
    with (folder / "trajectory.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["optimizer"] for row in rows} == {"gd", "muon"}
    last = next(row for row in rows if row["optimizer"] == "gd" and row["t"] == "1000.0")
    assert float(last["gap"]) == pytest.approx(0.1408002738, abs=1e-8)
    assert float(last["w1"]) - float(last["b1"]) == pytest.approx(2.0)
    assert last["pattern"] == "01|10"
    assert float(last["x_star"]) == pytest.approx(0.1408, abs=1e-4)
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["runs"][0]["margin_opt"] == 1.0
    page = (folder / "report.html").read_text()
    assert "http://" not in page.split("<body>")[0]
    assert 'data-figure="margin-inverse-gap"' in page
    assert "slope 1/C" in page


def test_wandb_has_the_trajectories(tmp_path: Path) -> None:
    assert command.main(["steps=100", "record=1", "wandb.mode=offline", "--out", "here"]) == 0
    (file,) = (tmp_path / "here" / "wandb").glob("offline-run-*/run-*.wandb")
    rows = [row for row in wandb_file.history(file) if "gd/gap" in row]
    assert [row["t"] for row in rows] == [0.0, 1.0, 10.0, 100.0]
    assert rows[-1]["gd/gap"] == pytest.approx(0.0621157172, abs=1e-8)
    text = file.read_bytes()
    assert b"margin" in text
    assert str(tmp_path).encode() not in text


def test_points_from_a_file_and_labels_that_need_more_neurons(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "three.csv").write_text("x,y\n-2,-1\n-1,-1\n1,1\n")
    found = answer(capsys, "data=three.csv", "w=2,-0.5", "steps=1000")
    assert found["runs"][0]["margin_opt"] == 1.0
    assert found["runs"][0]["C_predicted"] is None
    (tmp_path / "zebra.csv").write_text("-1,-1\n0,1\n1,-1\n")
    with pytest.raises(InputError, match="not separable by 2 neurons: their labels change 2 times"):
        command.main(["data=zebra.csv", OFF])


def test_other_geometries(capsys: pytest.CaptureFixture[str]) -> None:
    found = answer(capsys, "mode=flow", "data=2,1.5", "w=1,-2", "ln_tau_max=100", "record=1")
    (run,) = found["runs"]
    assert (run["margin_opt"], run["margin_inf"]) == (1.75, 1.625)
    assert any("margin_inf" in note for note in found["notes"])
    assert answer(capsys, "data=-1,1", "steps=100")["runs"][0]["margin_opt"] == 1.0


BAD = [
    (["w=-1,1"], "w: .*is dead: at the point -1 no neuron"),
    (["w=1,1"], "is dead: at the point -1"),
    (["data=1,-1"], "identical points"),
    (["data=0.5,-1"], "both sides of the origin"),
    (["data=none.csv"], "cannot be read"),
    (["data=1,2,3"], "two numbers a,c"),
    (["mode=too"], "did you mean toy"),
    (["stesp=5"], "did you mean steps"),
    (["steps=0"], "a whole number ≥ 1"),
    (["lr=-1"], "a number > 0"),
    (["w=1,-2", "b=1"], "does not fit w"),
    (["w=1"], "one neuron"),
    (["v=1,1"], "cannot give both signs"),
    (["v=often"], "fixed, trained"),
    (["w=a,b"], "not a list of numbers"),
    (["runs=3", "w=1,-2"], "all the same"),
    (["dim=3", "k=4"], "has no exact margin"),
    (["optimizer=sumoo"], "did you mean sumo"),
    (["adam.eps=0.1"], "does not run"),
    (["optimizer=adam", "adam.epss=0.1"], "did you mean eps"),
    (["mode=flow", "optimizer=adam"], "has no flow"),
    (["mode=flow", "dtype=float32"], "is for steps"),
    (["mode=flow", "join_at=1000", "ln_tau_max=1"], "is before the join"),
    (["mode=mlp", "dtype=float32"], "rounds certified radii"),
    (["mode=disks", "k=1"], "one neuron"),
    (["mode=disks", "dtype=float32"], "rounds certified radii"),
    (["mode=disks", "radius=-1"], "radius"),
    (["mode=disks", "points=0"], "a whole number ≥ 1"),
    (["mode=head"], r"checkpoints: null is needed: mode=head measures checkpoints; fix: .*GROUP/NAME"),
    (["experiment=margin_head"], r"runs/quickstart/\*/checkpoints/step_\* matches no folder"),
    (["experiment=quickstart"], "is for optbench train"),
    (["experiment=margin_none"], "did you mean margin"),
]


@pytest.mark.parametrize(("words", "part"), BAD, ids=[" ".join(words) for words, _ in BAD])
def test_bad_input_is_one_line_and_leaves_nothing(words: list[str], part: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=part) as caught:
        command.main([*words, OFF])
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("runs"))


def test_shipped_experiments_can_be_read() -> None:
    ours = [name for name in sources.options("experiment") if name.startswith("margin")]
    assert {load([f"experiment={name}"]).mode for name in ours} == {"toy", "flow", "disks", "mlp", "head"}
    assert load(["experiment=margin_inits", "runs=7"]).runs == 7


def test_help_lists_every_key(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["margin", "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    keys = {key for key in keys_of(MarginConfig) if key != "options"}
    shown = {line.split("=")[0].strip(): line for line in lines if line.startswith("  ") and "=" in line}
    assert keys <= set(shown)
    assert all(len(shown[key].split("  ")) == 3 for key in keys)
    assert "  norms=[l2,linf]  " in shown["norms"]


def test_the_toy_imports_no_torch() -> None:
    code = (
        "import sys\nfrom analysis.margin import command\n"
        f"assert command.main(['steps=10', '{OFF}', '--json']) == 0\nsys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, cwd=".",
                          env={"PYTHONPATH": str(Path(command.__file__).parents[2]), "PATH": ""})  # fmt: skip
    assert done.returncode == 0, done.stderr
