"""A snapshot is written where CUDA memory runs out, and only there. CUDA's recorder is mocked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from harness.memory_snapshot import MAX_ENTRIES, snapshot_when_out


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    calls: list[Any] = []
    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", lambda **options: calls.append(options))
    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", lambda path: Path(path).write_bytes(b"snapshot"))
    return calls


def _train(folder: Path, error: Exception | None, *, enabled: bool = True) -> None:
    with snapshot_when_out(folder, 3, enabled=enabled):
        if error is not None:
            raise error


def test_a_process_that_runs_out_leaves_its_snapshot(
    tmp_path: Path, recorder: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
        _train(tmp_path, torch.OutOfMemoryError("CUDA out of memory"))
    assert (tmp_path / "memory" / "rank3.pickle").read_bytes() == b"snapshot"
    assert recorder == [{"max_entries": MAX_ENTRIES, "stacks": "python"}, {"enabled": None}]
    assert "rank3.pickle" in capsys.readouterr().err


def test_any_other_end_leaves_none(tmp_path: Path, recorder: list[Any]) -> None:
    _train(tmp_path, None)
    with pytest.raises(RuntimeError, match="NCCL"):
        _train(tmp_path, RuntimeError("NCCL"))
    assert not (tmp_path / "memory").exists()
    assert recorder[1::2] == [{"enabled": None}] * 2


def test_without_the_key_nothing_is_recorded(tmp_path: Path, recorder: list[Any]) -> None:
    with pytest.raises(torch.OutOfMemoryError):
        _train(tmp_path, torch.OutOfMemoryError(), enabled=False)
    assert recorder == []
    assert not (tmp_path / "memory").exists()


def test_a_snapshot_that_cannot_be_written_does_not_hide_the_error(
    tmp_path: Path, recorder: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "memory").write_text("a file in the way")
    with pytest.raises(torch.OutOfMemoryError):
        _train(tmp_path, torch.OutOfMemoryError())
    assert "no memory snapshot" in capsys.readouterr().err
