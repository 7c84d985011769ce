"""What `optbench diverge` reads of runs: rows, tables of other trainers, and what it refuses."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from harness.config import compose
from harness.errors import InputError
from harness.verify.diverge import sources
from harness.verify.diverge.sources import Recorded
from harness.verify.diverge.trajectory import Trajectory

CONFIG = "steps: 100\noptimizer: {name: muon, lr: 0.01}\nseed: 3\n"


def run_folder(path: Path, *rows: dict[str, object], config: str = CONFIG, identity: str = "a") -> Path:
    path.mkdir(parents=True)
    (path / "config.yaml").write_text(config)
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (path / "status.json").write_text(json.dumps({"state": "finished", "identity": identity}))
    return path


def test_rows_of_a_run_up_to_a_step(tmp_path: Path) -> None:
    rows = [
        {"step": 1, "train/loss": 8.5, "grad_norm": 2.0},
        {"step": 10, "train/loss": None, "grad_norm": 3.0},
        {"step": 30, "train/loss": 7.0},
    ]
    found = sources.folder("RUN_A", run_folder(tmp_path / "a", *rows), 20)
    assert found.identity == "a"
    assert list(found.trajectory.losses) == [1, 10]
    assert found.trajectory.losses[1] == 8.5
    assert math.isnan(found.trajectory.losses[10])
    assert found.trajectory.gradient_norms == {1: 2.0, 10: 3.0}


def test_a_table_with_one_run_and_the_run_of_this_optimizer_and_seed_among_others(tmp_path: Path) -> None:
    one = tmp_path / "theirs.csv"
    one.write_text("step,train_loss,grad_norm\n1,8.5,2\n2,8.25,\n")
    found = sources.table("RUN_B", one, 20, "muon", 3)
    assert found.trajectory.losses == {1: 8.5, 2: 8.25}
    assert found.trajectory.gradient_norms == {1: 2.0}
    two = tmp_path / "both.csv"
    two.write_text("optimizer,seed,step,train/loss\nmuon,3,1,8.5\nmuon,4,1,8.6\nadamw,3,1,8.7\n")
    assert sources.table("RUN_B", two, 20, "muon", 4).trajectory.losses == {1: 8.6}
    with pytest.raises(InputError, match="has no run of soap, seed 3; allowed: muon seed 3, muon seed 4"):
        sources.table("RUN_B", two, 20, "soap", 3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("step,val_loss\n1,8.5\n", "has no train/loss at a step up to 20"),
        ("step,train/loss\n100,8.5\n", "has no train/loss at a step up to 20"),
        ("", "has no rows"),
    ],
)
def test_a_table_without_losses(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        sources.table("RUN_B", path, 20, "muon", 3)


def test_what_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        sources.folder("RUN_A", tmp_path / "none", 20)
    with pytest.raises(InputError, match=r"it has no config\.yaml"):
        sources.folder("RUN_A", tmp_path, 20)
    with pytest.raises(InputError, match="no row and no checkpoint of its first 20 steps"):
        sources.folder("RUN_A", run_folder(tmp_path / "a"), 20)
    with pytest.raises(InputError, match="cannot be read"):
        sources.table("RUN_B", tmp_path / "none.csv", 20, "muon", 3)


def test_runs_of_other_experiments_are_refused_with_the_keys(tmp_path: Path) -> None:
    def recorded(seed: int, identity: str | None) -> Recorded:
        path = tmp_path / f"{seed}.yaml"
        path.write_text(CONFIG.replace("seed: 3", f"seed: {seed}"))
        return Recorded(tmp_path / str(seed), compose.load_file(path), identity, Trajectory())

    sources.refuse_other_runs(recorded(3, "a"), recorded(3, "a"))
    sources.refuse_other_runs(recorded(3, "a"), recorded(4, None))
    with pytest.raises(InputError, match="seed differs, so the runs differ by more than rounding") as caught:
        sources.refuse_other_runs(recorded(3, "a"), recorded(4, "b"))
    assert "--force" in str(caught.value)
