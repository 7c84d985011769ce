"""`optbench reconstruct` as a user calls it: JSON, files, resuming, refusals, exit codes."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from analysis.reconstruction import alternatives, config, examination, job, samples, subjects
from analysis.reconstruction.network import outputs
from harness import cli
from harness.config.typed_keys import keys_of
from harness.errors import InputError

SMALL = (
    "per_class=3",
    "width=60",
    "steps=300",
    "checkpoints=1,300",
    "init_scale=0.05",
    "optimizer=gd",
    "attack.steps=40",
    "wandb.mode=disabled",
)


def run_json(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, dict[str, Any]]:
    code = cli.main(["reconstruct", *words, "wandb.mode=disabled", "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_the_fixture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, found = run_json(capsys, "mode=fixture", "classes=0,4", "per_class=15", "radius=1,100")
    assert code == 0
    assert found["schema_version"] == 1
    assert all(
        isinstance(found[k], list) for k in ("certificate", "alternatives", "attack", "susceptibility")
    )
    assert found["certificate"][0]["squared_norm"] == pytest.approx(3.6471, abs=1e-3)
    rows = {row["kind"]: row for row in found["alternatives"]}
    assert {"null_split", "in_span_split", "dead_pixel_split", "merge", "random_split"} <= set(rows)
    for row in found["alternatives"]:
        assert {"kind", "residual", "margin_min", "nn_distance", "is_control"} <= set(row)
        assert row["passed"] != row["is_control"]
        if not row["is_control"]:
            assert row["residual"] <= 1e-12 * max(1, row["radius"] or 0)
            assert row["nn_distance"] >= 0.5 * (row["radius"] or 0)
    # The page draws the theorem: residual and margin over the radius, exact splits and controls.
    (page,) = (tmp_path / "runs").rglob("report.html")
    assert all(f"theorem-{name}" in page.read_text() for name in ("residual", "margin"))
    controls = sorted(row["radius"] for row in found["alternatives"] if row["is_control"])
    assert controls == [0.05, 1, 100]
    # Another radius in the same place is another job with a folder of its own.
    assert run_json(capsys, "mode=fixture", "radius=7")[0] == 0
    assert len(list((tmp_path / "runs" / "reconstruction").iterdir())) == 2


def test_a_job_writes_its_files_and_takes_them_up_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "job"
    words = (*SMALL, f"out={out}", "attack.radius=0.1,3", "attack.weights=margin,raw", "data_sets=2")
    code, first = run_json(capsys, *words)
    assert code == 0
    # After one step nothing is separated: said, and no certificate claimed.
    assert {row["step"] for row in first["certificate"]} == {300}
    assert len(first["warnings"]) == 2
    assert "no certificate is claimed" in first["warnings"][0]
    kinds = {row["kind"] for row in first["attack"]}
    assert kinds == {"attack", "pooled", "heldout", "gaussian", "pair_means", "oracle"}
    assert {(row["data_sets"], row["seeds"]) for row in first["susceptibility"]} == {(2, 1)}
    assert {row["weights"] for row in first["susceptibility"]} == {"margin", "raw"}
    assert {row["data_set"] for row in first["certificate"]} == {0, 1}
    assert all(row["half_width_nn_top5"] is not None for row in first["susceptibility"])
    for name in ("certificate", "alternatives", "attack", "susceptibility", "paired", "duplicates"):
        frame = pd.read_parquet(out / f"{name}.parquet")
        assert len(frame) == len(first[name])
        # One separated step and one optimizer make no pair; an empty table has no columns.
        assert (name == "paired") == (len(frame) == 0)
        if len(frame):
            assert len(pd.read_csv(out / f"{name}.csv")) == len(frame)
    page = (out / "report.html").read_text()
    assert "not about language models" in page
    assert "does it depend on training time or optimizer?" in page
    assert len(page.encode()) < 1_500_000
    assert len(list((out / "images").glob("*.png"))) == 2
    # The second time nothing is computed anew, and the tables are the same.
    stamps = {
        p: p.stat().st_mtime_ns
        for folder in ("victims", "candidates", "parts")
        for p in (out / folder).iterdir()
    }
    code, again = run_json(capsys, *words)
    assert code == 0
    assert again == first
    assert stamps == {p: p.stat().st_mtime_ns for p in stamps}
    # A lost part is computed again from the candidates that are there: the same rows.
    (out / "parts" / "gd-set0-seed0-step300-attack.json").unlink()
    assert run_json(capsys, *words)[1] == first
    with pytest.raises(InputError, match=r"out: .* another configuration \(it differs in steps\)"):
        subjects.check_folder(
            config.load(["steps=301" if word.startswith("steps=") else word for word in words])
        )


def test_same_seed_same_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = [
        run_json(capsys, *SMALL, f"out={tmp_path / name}", f"seed={seed}")[1]
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    ]
    assert found[0] == found[1]
    assert found[0]["attack"] != found[2]["attack"]


def test_stages_one_by_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = (*SMALL, f"out={tmp_path / 'job'}")
    with pytest.raises(InputError, match="needs the victim gd-set0-seed0"):
        job.run(config.load([*words, "stages=attack"]), lambda line: None)
    victim = run_json(capsys, *words, "stages=victim")[1]
    assert victim["certificate"] == victim["alternatives"] == victim["attack"] == []
    assert len(run_json(capsys, *words, "stages=certificate")[1]["certificate"]) == 1
    assert len(run_json(capsys, *words, "stages=attack")[1]["attack"]) > 1


def test_three_classes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = (
        "classes=0,1,2",
        "per_class=3",
        "width=40,30",
        "bias=true",
        "init_scale=0.1",
        "steps=900",
        "checkpoints=900",
    )
    code, found = run_json(
        capsys, *words, "optimizer=gd,adamw", "attack.steps=30", "attack.radius=1", f"out={tmp_path / 'job'}"
    )
    assert code == 0
    assert {(row["optimizer"], row["objective"]) for row in found["susceptibility"]} == {
        ("gd", "l2"), ("adamw", "l2"), ("adamw", "matched")
    }  # fmt: skip


def test_a_checkpoint_of_ones_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(20, 16, generator=generator)
    head = torch.randn(1, 20, generator=generator)
    x = torch.randn(6, 16, generator=generator)
    y = (x @ first.T).relu() @ head.T
    torch.save({"0.weight": first, "2.weight": head}, tmp_path / "w.pt")
    np.savez(tmp_path / "b.npz", x=x.numpy(), y=y[:, 0].sign().numpy())
    words = (
        f"checkpoint={tmp_path / 'w.pt'}",
        f"batch={tmp_path / 'b.npz'}",
        "attack.steps=20",
        f"out={tmp_path / 'job'}",
    )
    code, found = run_json(capsys, *words)
    assert code == 0
    (row,) = found["certificate"]
    assert row["optimizer"] == "checkpoint"
    # Random weights are no KKT point, and the certificate says so.
    assert row["residual"] > 0.3
    assert {r["kind"] for r in found["attack"]} >= {"attack", "gaussian", "oracle"}
    assert found["susceptibility"] == []


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["per_class=900"], r"per_class: 900 .* fix: per_class=890"),
        (["per_clas=3"], r"per_clas: 3 is for an unknown key; did you mean per_class\?"),
        (["mode=fixture", "classes=8,9"], "no closed-form network"),
        (["mode=fixtur"], "mode: fixtur is wrong"),
        (["optimizer=muoon"], r"did you mean muon\?"),
        (["muon.lrr=3", "optimizer=muon"], r"muon\.lrr: 3 .*did you mean muon\.lr|muon\.lrr: 3"),
        (["adamw.lr=1"], "adamw: .* is for an optimizer that is not trained"),
        (["attack.radius=-1"], "attack.radius: .*numbers > 0"),
        (["data=sphere"], r"classes: odd_even is wrong.*fix: classes=hemispheres"),
        (["mode=fixture", "data_sets=2"], "data_sets: 2 needs victims to train on each"),
        (["attack.prior=pca", "attack.components=64"], r"attack.components: 64 .*allowed: 1 to 63"),
        (["attack.weights=unit"], "attack.weights: .*margin, raw|attack.weights: unit"),
        (["checkpoint=w.pt"], "checkpoint: w.pt needs batch=FILE"),
        (["optimizer=gd", "gd.lr=1e-9", "steps=2", "attack.steps=1"], "no certificate is claimed"),
        (["gd.lr=1e300", "optimizer=gd", "steps=30"], "not all finite|diverge|no certificate"),
        (["--full"], "is not an option"),
        (["experiment=quickstart"], "is for optbench train"),
        (["radius=0"], "radius: .*numbers > 0"),
    ],
)
def test_bad_input_is_one_line(
    words: list[str],
    line: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["reconstruct", *words, "wandb.mode=disabled"]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.search(line, error), error


def test_a_control_that_passes_is_the_answer_no(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the check of margins and residuals blinded, the command says no."""
    monkeypatch.setattr(alternatives, "_passes", lambda *_: True)
    assert run_json(capsys, "mode=fixture", f"out={tmp_path / 'job'}")[0] == 1


def test_experiments_are_valid() -> None:
    folder = Path(__file__).parents[3] / "configs" / "experiment"
    names = {path.stem for path in folder.glob("reconstruct_*.yaml")}
    assert names >= {"reconstruct_digits", "reconstruct_offset", "reconstruct_classes", "reconstruct_layers"}
    for name in names:
        assert config.load([f"experiment={name}"]).classes
    made = config.load(["experiment=reconstruct_digits", "data_sets=1"])
    assert (made.data_sets, made.optimizer) == (1, ["gd", "muon"])
    points = examination.grid(made, 10, 0)
    assert [p.radius for p in points] == [0.1, 1.0, 3.0]
    both = config.load(
        ["attack.weights=margin,raw", "attack.alpha=100", "attack.alpha_raw=7", "attack.radius=1"]
    )
    assert [(p.weights, p.alpha) for p in examination.grid(both, 10, 0)] == [("margin", 100.0), ("raw", 7.0)]


def test_the_attacked_network_has_a_least_margin_of_1(tmp_path: Path) -> None:
    """Unless raw weights are asked for; three layers with a bias, where the degree is 3."""
    words = [
        "width=40,30",
        "bias=true",
        "init_scale=0.1",
        "steps=600",
        "checkpoints=600",
        "optimizer=gd",
        "per_class=3",
    ]
    made = config.load([*words, f"out={tmp_path / 'job'}"])
    sets, _ = subjects.load(made)
    folder = subjects.JobFolder(made)
    (subject,) = subjects.subjects(made, sets[0], None, folder, lambda line: None)
    found = examination.Examination(made, sets[0], subject, folder)
    margins = {
        weights: float((outputs(found.attacked(weights), sets[0].x)[:, 0] * sets[0].labels).min())
        for weights in ("margin", "raw")
    }
    assert margins["margin"] == pytest.approx(1, abs=1e-12)
    assert margins["raw"] > 1.5
    assert found.problems("l2")[0].network.squared_norm == found.attacked("margin").squared_norm


def test_sets_of_images_are_independent_replicates(tmp_path: Path) -> None:
    """Disjoint sets, a public pool that no set touches, and own seeds of weights and attacks for each."""
    words = ["data_sets=3", "per_class=4", "optimizer=gd", "steps=1", "checkpoints=1", "width=6"]
    made = config.load([*words, f"out={tmp_path / 'job'}"])
    sets, _ = subjects.load(made)
    pixels = [one.samples.images + one.samples.mean for one in sets]
    pixels.append(sets[0].samples.heldout + sets[0].samples.mean)
    for one, other in itertools.combinations(pixels, 2):
        assert np.abs(one[:, None] - other[None]).max(-1).min() > 0.01
    folder = subjects.JobFolder(made)
    starts = [next(subjects.subjects(made, one, None, folder, lambda line: None)).initial for one in sets]
    seeds = [examination.grid(made, 8, one.data_set)[0].seed for one in sets]
    assert len({float(start.squared_norm) for start in starts if start}) == len(set(seeds)) == 3
    # The weights' stream is not the candidates', or candidates would start parallel to the initial weights.
    assert subjects.derived_seed(0, 1, "victim") != subjects.derived_seed(0, 1, "attack")
    with pytest.raises(InputError, match=r"^per_class: 4 .*for each of 300 sets.*allowed: 1 to 2"):
        subjects.load(config.load(["data_sets=300", "per_class=4"]))
    with pytest.raises(InputError, match=r"^data_sets: 2000 .*allowed: 1 to"):
        subjects.load(config.load(["data_sets=2000"]))


def test_attackers_believe_in_offsets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A secret offset and a bias: who starts around the offset is nearer, set by set, than who starts around 0."""
    trained = ("per_class=3", "width=200", "steps=300", "checkpoints=300", "optimizer=gd", "gd.lr=0.03")
    secret = ("offset=1", "bias=true", "data_sets=2", "stages=victim,attack")
    believed = ("attack.prior=offset", "attack.offset=1,0", "attack.radius=0.1", "attack.steps=20")
    words = (*trained, *secret, *believed, f"out={tmp_path / 'job'}")
    code, found = run_json(capsys, *words)
    assert code == 0
    attacks = [row for row in found["attack"] if row["kind"] == "attack"]
    assert [row["offset"] for row in attacks] == [1.0, 0.0] * 2
    for right, wrong in zip(attacks[::2], attacks[1::2]):
        # 64 pixels off by 1.
        assert 6 < wrong["nn_top5"] < 9
        assert right["nn_top5"] < 3
    distance = next(row for row in found["paired"] if row["measure"] == "nn_top5_margin")
    assert (distance["contrast"], distance["pair"], distance["leaks_more"]) == (
        "offsets",
        "gd: offset 0 − 1",
        0,
    )
    assert run_json(capsys, *words)[1]["attack"] == found["attack"]


def test_points_of_a_sphere() -> None:
    held = samples.load("sphere", None, "hemispheres", 50, 3, 0.0, 36)
    np.testing.assert_allclose(np.linalg.norm(held.images, axis=1), 1, rtol=1e-14)
    assert ((held.images[:, 0] > 0) == (held.labels > 0)).all()
    assert held.images.shape == (100, 36)
    assert held.shape == (6, 6)
    assert not held.mean.any()
    # Public points are other points.
    assert np.abs(held.images @ held.heldout.T).max() < 1 - 1e-6
    other = samples.load("sphere", None, "hemispheres", 50, 4, 0.0, 36)
    assert np.abs(held.images - other.images).max() > 0.1


def test_bad_words_are_answered_without_torch() -> None:
    program = """
import sys
from harness import cli
code = cli.main(["reconstruct", "per_class=900"])
assert "torch" not in sys.modules
sys.exit(code)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2, done.stderr


def test_wandb_offline_holds_tables_images_and_artifacts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tests.harness.record import wandb_file

    out = tmp_path / "job"
    assert cli.main(["reconstruct", *SMALL[:-1], f"out={out}", "wandb.mode=offline", "--json"]) == 0
    json.loads(capsys.readouterr().out)
    (file,) = (out / "wandb").glob("offline-run-*/run-*.wandb")
    rows = wandb_file.history(file)
    keys = {re.split(r"[./]", key)[0] for row in rows for key in row}
    assert {"certificate", "alternatives", "attack", "susceptibility"} <= keys
    assert "images" in keys
    content = file.read_bytes().decode(errors="ignore")
    for word in ("reconstruction", "victims", "candidates", "alternatives"):
        assert word in content
    assert str(tmp_path) not in content.replace(str(out / "wandb"), "")


def test_an_interrupted_job_says_that_it_can_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(examination.Examination, "keep", interrupted)
    words = [*SMALL, f"out={tmp_path / 'job'}"]
    assert cli.main(["reconstruct", *words]) == 75
    assert "the same command resumes" in capsys.readouterr().err
    monkeypatch.undo()
    assert cli.main(["reconstruct", *words]) == 0


def test_help_lists_every_key(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["reconstruct", "--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"  {key}=" in text for key in keys_of(config.ReconstructionConfig) if key != "options")
    assert "attack.radius=[0.1,1,3]" in text
