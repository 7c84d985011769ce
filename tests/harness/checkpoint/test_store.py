"""Names, retention and what is refused, without torch or processes."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.checkpoint import store
from harness.checkpoint.store import DamagedCheckpoint, Retention, Store
from harness.files import atomic


def write(checkpoints: Store, step: int, world_size: int = 1, **manifest: Any) -> None:
    partial = checkpoints.partial(step, "1-1")
    partial.mkdir(parents=True)
    for rank in range(world_size):
        path = partial / store.rank_name(rank)
        path.write_bytes(b"numbers" * (rank + 1))
        atomic.write_json(partial / store.digest_name(rank), store.digest(path))
    atomic.write_text(partial / store.CONFIG, "seed: 0\n")
    facts = {"identity": "aaaa", "engine": "single", "world_size": world_size, "step": step}
    checkpoints.commit(step, partial, {**facts, **manifest})
    checkpoints.point_to(step)


def test_a_checkpoint_has_its_name_once_it_is_whole(tmp_path: Path) -> None:
    checkpoints = Store(tmp_path)
    write(checkpoints, 7, world_size=2)
    assert sorted(path.name for path in checkpoints.path.iterdir()) == ["latest", "step_00000007"]
    assert (checkpoints.path / "latest").read_text() == "step_00000007\n"
    manifest = store.verify(checkpoints.folder(7))
    assert sorted(manifest["files"]) == ["config.yaml", "rank_00000.safetensors", "rank_00001.safetensors"]


def test_a_process_whose_file_is_not_there_is_named(tmp_path: Path) -> None:
    checkpoints = Store(tmp_path)
    partial = checkpoints.partial(7, "1-1")
    partial.mkdir(parents=True)
    path = partial / store.rank_name(0)
    path.write_bytes(b"numbers")
    atomic.write_json(partial / store.digest_name(0), store.digest(path))
    with pytest.raises(DamagedCheckpoint, match=r"rank 1 .* all nodes share"):
        checkpoints.commit(7, partial, {"world_size": 2})
    assert checkpoints.steps() == []


def test_what_was_never_finished_is_not_seen_and_removed(tmp_path: Path) -> None:
    checkpoints = Store(tmp_path)
    write(checkpoints, 7)
    checkpoints.partial(8, "1-2").mkdir()
    (checkpoints.path / ".step_00000005.old").mkdir()
    assert checkpoints.steps() == [7]
    checkpoints.discard_partial()
    assert sorted(path.name for path in checkpoints.path.iterdir()) == ["latest", "step_00000007"]


def test_a_damaged_one_of_the_same_step_is_replaced(tmp_path: Path) -> None:
    checkpoints = Store(tmp_path)
    write(checkpoints, 7)
    (checkpoints.folder(7) / "rank_00000.safetensors").write_bytes(b"")
    write(checkpoints, 7)
    assert store.verify(checkpoints.folder(7))["step"] == 7


def forge(folder: Path, content: object) -> None:
    """Put another manifest into a checkpoint, with the checksum that belongs to it."""
    text = content if isinstance(content, str) else json.dumps(content)
    (folder / "manifest.json").write_text(text)
    (folder / "manifest.sha256").write_text(store.digest(folder / "manifest.json")["sha256"] + "\n")


def test_another_format_is_refused_with_both_versions(tmp_path: Path) -> None:
    checkpoints = Store(tmp_path)
    write(checkpoints, 7)
    folder = checkpoints.folder(7)
    forge(folder, json.loads((folder / "manifest.json").read_text()) | {"schema_version": 99})
    with pytest.raises(DamagedCheckpoint, match="format 99, this version reads 1"):
        store.verify(folder)


FACTS = {"bytes": 7, "sha256": "0" * 64}


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"files": {}}, "lists 0 files of 2 processes"),
        ({"files": []}, "files: Input should be"),
        (
            {"files": {"config.yaml": FACTS, "rank_00000.safetensors": FACTS}},
            "does not list rank_00001.safetensors",
        ),
        ({"world_size": 10**9}, "of 1000000000 processes"),
        ({"world_size": 10**30}, "world_size: "),
        ({"world_size": 0}, "world_size: "),
        ({"world_size": -1}, "world_size: "),
        ({"world_size": "2"}, "world_size: "),
        ({"world_size": True}, "world_size: "),
        ({"world_size": None}, "world_size: "),
        ({"world_size": 1}, "'rank_00001.safetensors', no file of a checkpoint"),
        ({"world_size": 3}, "does not list rank_00002.safetensors"),
        ({"+": {"../../other/rank_00000.safetensors": FACTS}}, "no file of a checkpoint"),
        ({"+": {"/etc/passwd": FACTS}}, "no file of a checkpoint"),
        ({"+": {"rank_00001.safetensors": []}}, "rank_00001.safetensors"),
        ({"+": {"rank_00001.safetensors": FACTS | {"bytes": -1}}}, "bytes"),
        ({"+": {"rank_00001.safetensors": FACTS | {"sha256": "../x"}}}, "sha256"),
        ({"-": "config.yaml"}, "does not list config.yaml"),
        ({"step": 8}, "is that of step 8"),
        ({"step": "7"}, "step: "),
        ({"identity": 5}, "identity: "),
        ({"val_loss": "low"}, "val_loss: "),
    ],
)
def test_a_manifest_that_is_none_is_one_line(change: dict[str, Any], problem: str, tmp_path: Path) -> None:
    checkpoints = Store(tmp_path)
    write(checkpoints, 7, world_size=2)
    folder = checkpoints.folder(7)
    manifest = json.loads((folder / "manifest.json").read_text())
    forge(folder, manifest)
    store.verify(folder)  # the control: the same manifest, forged to say the truth
    manifest["files"] |= change.pop("+", {})
    manifest["files"].pop(change.pop("-", ""), None)
    forge(folder, manifest | change)
    with pytest.raises(DamagedCheckpoint) as caught:
        store.verify(folder)
    assert problem in str(caught.value)
    assert "\n" not in str(caught.value)
    checkpoints.prune(Retention(1, best=True))  # what reads it beside others does not stop either


@pytest.mark.parametrize(
    "content", ["[]", "null", "7", '"files"', "[" * 100_000, '{"step": ' + "9" * 5000 + "}", "", "\ud800"]
)
def test_a_manifest_that_holds_no_object_is_one_line(content: str, tmp_path: Path) -> None:
    checkpoints = Store(tmp_path)
    write(checkpoints, 7)
    forge(checkpoints.folder(7), content.encode("utf-8", "replace").decode())
    with pytest.raises(DamagedCheckpoint) as caught:
        store.verify(checkpoints.folder(7))
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    "name", ["rank_00000.safetensors", "config.yaml", "manifest.json", "manifest.sha256"]
)
@pytest.mark.parametrize("kind", ["pipe", "folder", "link"])
def test_what_is_no_file_is_not_opened(name: str, kind: str, tmp_path: Path) -> None:
    checkpoints = Store(tmp_path)
    write(checkpoints, 7)
    path = checkpoints.folder(7) / name
    path.rename(tmp_path / "elsewhere")
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to(tmp_path / "nowhere")
    with pytest.raises(DamagedCheckpoint, match=name):
        store.verify(checkpoints.folder(7))


@pytest.mark.parametrize(
    ("retention", "kept"),
    [
        (Retention(2), {50, 60}),
        (Retention(1, best=True), {20, 60}),
        (Retention(1, every=30), {30, 60}),
        (Retention(2, best=True, every=30), {20, 30, 50, 60}),
        (Retention(9), {10, 20, 30, 40, 50, 60}),
    ],
)
def test_which_stay(retention: Retention, kept: set[int], tmp_path: Path) -> None:
    checkpoints = Store(tmp_path)
    for step, loss in {10: 3.0, 20: 1.0, 30: None, 40: 1.0, 50: 2.0, 60: None}.items():
        write(checkpoints, step, val_loss=loss)
    checkpoints.prune(retention)
    assert set(checkpoints.steps()) == kept
    assert {path.name for path in checkpoints.path.iterdir()} == {
        "latest",
        *(checkpoints.folder(s).name for s in kept),
    }


@given(
    st.dictionaries(st.integers(1, 1000), st.none() | st.floats(0, 10), min_size=1),
    st.integers(1, 5),
    st.booleans(),
    st.none() | st.integers(1, 50),
)
def test_the_newest_always_stays(
    losses: dict[int, float | None], last: int, best: bool, every: int | None
) -> None:
    kept = Retention(last, best, every).kept(losses)
    assert max(losses) in kept
    assert kept <= losses.keys()
    assert len(kept) >= min(last, len(losses))


def test_checkpoints_of_an_abandoned_attempt_are_set_aside(tmp_path: Path) -> None:
    checkpoints = Store(tmp_path)
    checkpoints.archive(1)
    write(checkpoints, 7)
    checkpoints.archive(2)
    assert checkpoints.steps() == []
    assert (tmp_path / "checkpoints.attempt2" / "step_00000007" / "manifest.json").exists()
