"""Any interval of any tensor out of files that other intervals were written to, against plain indexing."""

from __future__ import annotations

import os
import pickle
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from harness.checkpoint import files, store
from harness.checkpoint.files import Saved
from harness.checkpoint.store import DamagedCheckpoint, Store
from harness.files import atomic
from optimizers.named_state import FLAT, StatePiece


def cut(tensor: torch.Tensor, dim: int | None, count: int) -> list[StatePiece]:
    """The parts of ``count`` processes, the way an engine cuts: ceil chunks, the last ones may be empty."""
    if dim is None:
        return [StatePiece("w", "moment", tuple(tensor.shape), None, 0, tensor, True)]
    source = tensor.reshape(-1) if dim == FLAT else tensor
    axis = 0 if dim == FLAT else dim
    size = -(-source.shape[axis] // count)
    parts = []
    for rank in range(count):
        start = min(rank * size, source.shape[axis])
        length = min(size, source.shape[axis] - start)
        part = source.narrow(axis, start, length).contiguous()
        parts.append(StatePiece("w", "moment", tuple(tensor.shape), dim, start, part, True))
    return parts


def saved(folder: Path, parts: list[StatePiece], **facts: Any) -> Path:
    checkpoints = Store(folder)
    partial = checkpoints.partial(1, "1-1")
    partial.mkdir(parents=True)
    for rank, part in enumerate(parts):
        own = {"torch": torch.get_rng_state()}
        told = {"rank": rank, "step": 1, "tokens": 8, **facts}
        files.write(partial, rank, [part] if part.tensor.numel() else [], own, told)
    atomic.write_text(partial / store.CONFIG, "seed: 0\n")
    manifest = {"identity": "aaaa", "engine": "single", "step": 1, "world_size": len(parts)}
    checkpoints.commit(1, partial, manifest)
    return checkpoints.folder(1)


DIMS = st.sampled_from([None, 0, 1, FLAT])


@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    written=DIMS,
    writers=st.integers(1, 5),
    wanted=DIMS,
    readers=st.integers(1, 5),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.int64]),
)
def test_every_cut_reads_every_other_cut(
    shape: tuple[int, int],
    written: int | None,
    writers: int,
    wanted: int | None,
    readers: int,
    dtype: torch.dtype,
) -> None:
    whole = torch.arange(shape[0] * shape[1]).view(shape).to(dtype)
    with tempfile.TemporaryDirectory() as folder:
        reader = Saved(saved(Path(folder), cut(whole, written, writers)))
        for part in cut(whole, wanted, readers):
            expected, found = part.tensor, reader.read(part._replace(tensor=torch.zeros_like(part.tensor)))
            assert found.dtype == dtype
            assert torch.equal(found, expected)
        assert torch.equal(reader.whole("w", "moment"), whole)
        reader.close()


def test_vectors_too(tmp_path: Path) -> None:
    whole = torch.arange(7.0)
    reader = Saved(saved(tmp_path, cut(whole, 0, 3)))
    assert torch.equal(reader.whole("w", "moment"), whole)
    assert reader.names("moment") == ["w"]
    assert reader.shape("w", "moment") == (7,)


def test_a_part_that_is_missing_is_named(tmp_path: Path) -> None:
    parts = cut(torch.ones(6, 2), 0, 3)
    parts[1] = parts[1]._replace(tensor=torch.empty(0, 2))
    reader = Saved(saved(tmp_path, parts))
    with pytest.raises(DamagedCheckpoint, match="moment of w is incomplete"):
        reader.whole("w", "moment")
    with pytest.raises(DamagedCheckpoint, match="basis of w is missing"):
        reader.read(parts[0]._replace(kind="basis"))
    with pytest.raises(DamagedCheckpoint, match=r"has shape \(6, 2\), expected \(3, 4\)"):
        reader.read(parts[0]._replace(shape=(3, 4)))


class _Bomb:
    """Runs code where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_nothing_in_a_checkpoint_is_executed(tmp_path: Path) -> None:
    """A pickle under the right name and with the right checksum: refused, not opened. The control: it would run."""
    folder = saved(tmp_path, cut(torch.ones(4, 4), None, 1))
    bomb = tmp_path / "exploded"
    (folder / "rank_00000.safetensors").write_bytes(pickle.dumps(_Bomb(bomb)))
    manifest = store.read_manifest(folder)
    manifest["files"]["rank_00000.safetensors"] = store.digest(folder / "rank_00000.safetensors")
    atomic.write_json(folder / "manifest.json", manifest)
    atomic.write_text(folder / "manifest.sha256", store.digest(folder / "manifest.json")["sha256"] + "\n")
    store.verify(folder)
    with pytest.raises(DamagedCheckpoint, match=r"rank_00000\.safetensors"):
        Saved(folder)
    assert not bomb.exists()
    pickle.loads(pickle.dumps(_Bomb(bomb)))
    assert bomb.exists()


def test_a_name_in_a_manifest_cannot_leave_its_folder(tmp_path: Path) -> None:
    folder = saved(tmp_path, cut(torch.ones(4, 4), None, 1))
    (tmp_path / "secret").write_text("secret")
    manifest = store.read_manifest(folder)
    manifest["files"]["../../secret"] = store.digest(tmp_path / "secret")
    atomic.write_json(folder / "manifest.json", manifest)
    atomic.write_text(folder / "manifest.sha256", store.digest(folder / "manifest.json")["sha256"] + "\n")
    with pytest.raises(DamagedCheckpoint, match="no file of a checkpoint"):
        store.verify(folder)


@pytest.mark.parametrize(
    ("metadata", "problem"),
    [
        (None, "has no 'facts' in its header"),
        ({"facts": "{}"}, "has no 'index' in its header"),
        ({"facts": "[]", "index": "{}"}, "its header is wrong"),
        ({"facts": '{"step": 2, "tokens": 8}', "index": "{}"}, "was written after step 2"),
        ({"facts": '{"step": "1", "tokens": 8}', "index": "{}"}, "written after step 1"),
        ({"index": "[]"}, "its header is wrong"),
        ({"index": "[" * 5000}, "nested deeper"),
        ({"index": '{"a": {"name": "w", "kind": "k", "shape": "44", "dim": 0, "start": 0}}'}, "a.shape"),
        ({"index": '{"a": {"name": "w", "kind": "k", "shape": [4], "dim": -7, "start": 0}}'}, "a.dim"),
        ({"index": '{"b": {"name": "w", "kind": "k", "shape": [4], "dim": null, "start": 0}}'}, "b"),
    ],
)
def test_an_odd_header_is_one_line(metadata: dict[str, str] | None, problem: str, tmp_path: Path) -> None:
    """Forged whole: size, checksum and manifest are right; what the header says is not."""
    folder = saved(tmp_path, cut(torch.ones(4, 4), None, 1))
    path = folder / "rank_00000.safetensors"
    facts = {} if metadata is None else {"facts": '{"step": 1, "tokens": 8}'}
    save_file({"a": torch.ones(4)}, path, metadata=None if metadata is None else facts | metadata)
    manifest = store.read_manifest(folder)
    manifest["files"][path.name] = store.digest(path)
    atomic.write_json(folder / "manifest.json", manifest)
    atomic.write_text(folder / "manifest.sha256", store.digest(folder / "manifest.json")["sha256"] + "\n")
    store.verify(folder)
    with pytest.raises(DamagedCheckpoint) as caught:
        Saved(folder)
    assert problem in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("umask", [0o002, 0o022, 0o077])
def test_who_may_read_a_checkpoint_is_the_umasks_choice(umask: int, tmp_path: Path) -> None:
    """safetensors and tempfile write 0600 whatever the umask is, which hides a run from the rest of a group."""
    before = os.umask(umask)
    try:
        folder = saved(tmp_path, cut(torch.ones(4, 4), None, 1))
        (tmp_path / "control").touch()
    finally:
        os.umask(before)
    expected = (tmp_path / "control").stat().st_mode
    assert {path.name: path.stat().st_mode for path in folder.iterdir()} == {
        path.name: expected for path in folder.iterdir()
    }
