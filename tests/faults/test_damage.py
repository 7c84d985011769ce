"""Bit flips, truncation and loss of each file of a checkpoint: always seen, named, and passed over."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from harness.checkpoint import store
from harness.checkpoint.store import DamagedCheckpoint, Store
from harness.record import readers
from tests.faults.checkpoints import assert_same, status
from tests.faults.forked import trained
from tests.harness.running import small

FILES = [
    "manifest.json",
    "manifest.sha256",
    "config.yaml",
    "rank_00000.safetensors",
    "rank_00001.safetensors",
]
WORDS = ["world_size=2", "optimizer=sumo", "optimizer.rank=8", "steps=6", "checkpoint.every=2", "name=run"]


@pytest.fixture(scope="module")
def run(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two processes with checkpoints after 4 and 6 steps."""
    folder = tmp_path_factory.mktemp("damage")
    assert trained(small(corpus, folder, *WORDS), 2, folder / "said.txt") == [0, 0]
    return folder / "default" / "run"


def damage(path: Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    if how == "gone":
        path.unlink()
        return
    if how == "empty":
        content = bytearray()
    elif how == "cut":
        content = content[:-1]
    elif how == "longer":
        content += b"\0"
    else:
        place = {"first bit": 0, "middle bit": len(content) // 2, "last bit": len(content) - 1}[how]
        content[place] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("how", ["first bit", "middle bit", "last bit", "cut", "longer", "empty", "gone"])
@pytest.mark.parametrize("name", FILES)
def test_every_damage_of_every_file_is_seen(name: str, how: str, run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "step_00000006"
    shutil.copytree(Store(run).folder(6), copy)
    store.verify(copy)  # the control: what was not touched is accepted
    damage(copy / name, how)
    with pytest.raises(DamagedCheckpoint, match="step_00000006") as caught:
        store.verify(copy)
    assert name.split(".")[0] in str(caught.value)


@pytest.mark.parametrize("stride", [7, pytest.param(1, marks=pytest.mark.slow)])
def test_every_single_bit_of_a_manifest(stride: int, run: Path, tmp_path: Path) -> None:
    """Or every seventh: one of each byte, at each of the eight places."""
    copy = tmp_path / "step_00000006"
    shutil.copytree(Store(run).folder(6), copy)
    content = (copy / "manifest.json").read_bytes()
    for position in range(0, 8 * len(content), stride):
        flipped = bytearray(content)
        flipped[position // 8] ^= 1 << position % 8
        (copy / "manifest.json").write_bytes(bytes(flipped))
        with pytest.raises(DamagedCheckpoint):
            store.verify(copy)


def _copied(run: Path, folder: Path) -> Path:
    """The run as if it had been killed right after its last checkpoint."""
    copy = folder / "default" / "run"
    shutil.copytree(run, copy)
    (copy / "DONE").unlink()
    return copy


def test_the_newest_valid_one_is_used_and_the_damaged_one_is_named(
    run: Path, corpus: Path, tmp_path: Path
) -> None:
    copy = _copied(run, tmp_path)
    damage(Store(copy).folder(6) / "rank_00001.safetensors", "middle bit")
    assert trained(small(corpus, tmp_path, *WORDS), 2, tmp_path / "said.txt") == [0, 0]
    said = (copy / "log.txt").read_text()
    assert "checkpoint not used: step_00000006: rank_00001.safetensors has changed" in said
    assert "resumed after step 4" in said
    assert_same(run, copy, 6)
    assert status(copy)["attempts"][-1]["first_step"] == 4


def test_without_a_valid_one_it_starts_again_and_says_so(run: Path, corpus: Path, tmp_path: Path) -> None:
    copy = _copied(run, tmp_path)
    for step in (4, 6):
        damage(Store(copy).folder(step) / "manifest.json", "cut")
    assert trained(small(corpus, tmp_path, *WORDS), 2, tmp_path / "said.txt") == [0, 0]
    assert "no checkpoint can be used: starting at step 0" in (copy / "log.txt").read_text()
    assert_same(run, copy, 6)


def test_resume_false_starts_again_and_keeps_what_there_was(run: Path, corpus: Path, tmp_path: Path) -> None:
    copy = _copied(run, tmp_path)
    assert trained(small(corpus, tmp_path, *WORDS, "resume=false"), 2, tmp_path / "said.txt") == [0, 0]
    assert status(copy)["attempts"][-1]["first_step"] == 0
    assert [path.name for path in copy.glob("checkpoints.attempt1/step_*")] != []
    assert_same(run, copy, 6)


def test_a_checkpoint_of_another_run_is_refused_with_the_keys(
    run: Path, corpus: Path, tmp_path: Path
) -> None:
    mine = [word for word in WORDS if not word.startswith("optimizer.rank")]
    words = small(corpus, tmp_path, *mine, "optimizer.rank=4", "seed=3")
    copy = tmp_path / "default" / "run"
    assert trained(words, 2, tmp_path / "first.txt") == [0, 0]
    (copy / "DONE").unlink()
    shutil.rmtree(Store(copy).path)
    shutil.copytree(Store(run).path, Store(copy).path)
    codes = trained(words, 2, tmp_path / "said.txt")
    assert codes == [2, 2]
    said = (tmp_path / "said.txt").read_text()
    assert "is a checkpoint of run" in said
    assert "optimizer.rank" in said
    assert "seed" in said


@pytest.mark.parametrize("what", ["metrics and moments", "status"])
def test_damaged_records_do_not_keep_a_run_from_its_checkpoint(
    what: str, run: Path, corpus: Path, tmp_path: Path
) -> None:
    """The run as it was killed after step 4 of 6, and something has damaged what it noted about itself."""
    words = small(corpus, tmp_path, *WORDS)
    copy = tmp_path / "default" / "run"
    shutil.copytree(run, copy)
    for path in (Store(copy).folder(6), copy / "DONE", copy / "summary.json"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    if what == "status":
        (copy / "status.json").write_bytes(b"\0" * 300)
    else:
        content = bytearray((copy / "metrics.jsonl").read_bytes())
        content[5] ^= 1
        (copy / "metrics.jsonl").write_bytes(content + b'{"step": "six"}\n[[[\n{"step": 4}')
        damage(copy / "moments.parquet", "last bit")
    said = tmp_path / "said.txt"
    assert trained(words, 2, said) == [0, 0], said.read_text()
    assert "resumed after step 4" in said.read_text()
    assert status(copy)["attempts"][-1]["first_step"] == 4
    assert_same(run, copy, 6)
    warnings = [line for line in said.read_text().splitlines() if line.startswith("warning: ")]
    if what == "status":
        assert any("status.json" in line for line in warnings)
        return
    assert any("lines of metrics.jsonl can't be read and are skipped" in line for line in warnings)
    assert "moments.parquet cannot be read" in said.read_text()
    assert (copy / "moments.parquet.unreadable").exists()
    rows, problems = readers.metrics(copy / "metrics.jsonl")
    assert problems == []
    assert [row["step"] for row in rows][-2:] == [5, 6]
