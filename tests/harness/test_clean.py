"""`optbench clean`: what it lists, what it must not, and that it removes nothing unless it is told to."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from harness.cli import main
from harness.config.schema import RunConfig
from harness.record.folder import RunFolder

SAFE = [
    "run/metrics.attempt1.jsonl",
    "run/metrics.superseded.jsonl",
    "run/metrics.damaged.jsonl",
    "run/moments.parquet.unreadable",
    "run/.summary.json.0123abcd",
    "run/checkpoints/.step_00000007.1-2.partial/rank_00000.safetensors",
    "run/checkpoints/.step_00000005.old/manifest.json",
    "run/checkpoints.attempt1/step_00000009/manifest.json",
    "run/wandb/.offline-run-20260101_000000-abc/run-abc.wandb",
    "run/wandb/offline-run-20260102_000000-abc/run-abc.wandb.synced",
    ".run.replaced-20260101-120000-123456/status.json",
    ".run.replaced-20260101-120000-123456/metrics.jsonl",
]
NEEDED = [
    "run/status.json",
    "run/metrics.jsonl",
    "run/config.steps100.yaml",
    "run/summary.json",
    "run/checkpoints/latest",
    "run/checkpoints/step_00000007/manifest.json",
    "run/wandb/offline-run-20260103_000000-abc/run-abc.wandb",
    "run/wandb/run-20260103_000000-abc/run-abc.wandb",
    "run/.gitignore",
    "run/notes.attempt1.jsonl",
    ".run.lock",
    "thesis/metrics.attempt1.jsonl",  # no run: no status.json
    ".thesis.replaced-20260101-120000-123456/thesis.tex",
    "report.html",
]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in (*SAFE, *NEEDED):
        path = tmp_path / "runs" / "g" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"0123456789")
    return tmp_path / "runs"


def files(root: Path) -> set[str]:
    return {str(path.relative_to(root / "g")) for path in root.rglob("*") if path.is_file()}


@pytest.mark.parametrize("where", ["", "g", "g/run"])
def test_it_removes_what_it_lists_and_only_when_told_to(
    where: str, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The lists are by hand: what this program or W&B writes, and next to it what looks alike."""
    here = root / where
    assert main(["clean", str(here), "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert files(root) == {*SAFE, *NEEDED}
    assert listed["removed"] is False
    assert listed["total_bytes"] == 10 * (len(SAFE) if where != "g/run" else len(SAFE) - 2)
    assert main(["clean", str(here), "--json", "--yes"]) == 0
    removed = json.loads(capsys.readouterr().out)
    assert removed["items"] == listed["items"]
    left = {*NEEDED, *(SAFE[-2:] if where == "g/run" else [])}
    assert files(root) == left
    assert main(["clean", str(here), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["items"] == []


def test_for_people(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["clean", str(root)]) == 0
    out = capsys.readouterr().out
    assert "nothing is removed without --yes" in out
    assert "run that overwrite=true replaced" in out
    assert main(["clean", str(root), "--yes"]) == 0
    assert "removed 11 of 11" in capsys.readouterr().out


def test_a_run_that_is_being_written_is_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = RunConfig.model_validate({"world_size": 1, "micro_batch_size": 4})
    run = RunFolder(tmp_path / "g" / "run", config, "aaaa")
    partial = tmp_path / "g" / "run" / "checkpoints" / ".step_00000007.1-2.partial"
    partial.mkdir(parents=True)
    assert main(["clean", str(tmp_path), "--yes", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["in_use"] == [str(tmp_path / "g" / "run")]
    assert partial.exists()
    run.close()
    assert main(["clean", str(tmp_path), "--yes"]) == 0
    assert not partial.exists()


def test_links_are_not_followed(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outside = tmp_path / "outside"
    (outside / "step_00000001").mkdir(parents=True)
    (outside / "status.json").write_text("{}")
    (outside / "metrics.attempt1.jsonl").write_text("{}")
    (root / "g" / "link").symlink_to(outside)
    (root / "g" / "run" / "checkpoints.attempt2").symlink_to(outside)
    (root / "g" / "run" / "metrics.attempt7.jsonl").symlink_to(outside / "status.json")
    assert main(["clean", str(root), "--yes"]) == 0
    assert sorted(path.name for path in outside.iterdir()) == [
        "metrics.attempt1.jsonl",
        "status.json",
        "step_00000001",
    ]
    assert not os.path.lexists(root / "g" / "run" / "metrics.attempt7.jsonl")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nowhere"], "is not a folder"),
        (["a", "b"], "more than one folder"),
        (["--yess"], "did you mean --yes?"),
    ],
)
def test_bad_words_are_one_line(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["clean", *words]) == 2
    assert said in capsys.readouterr().err
