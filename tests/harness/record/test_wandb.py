"""The mirror in W&B: what it does when W&B is not there, and whom it takes for logged in."""

from __future__ import annotations

import builtins
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType

import pytest

from harness.config.schema import RunConfig
from harness.record import wandb as mirror
from tests.harness.record import wandb_file


def _config(mode: str) -> RunConfig:
    return RunConfig.model_validate(
        {"wandb": {"mode": mode}, "data": {"files": ["/secret/place/text.jsonl"]}}
    )


def _sink(mode: str, folder: Path) -> tuple[mirror.WandbSink, list[str]]:
    said: list[str] = []
    folder.mkdir()
    return mirror.WandbSink(
        _config(mode), folder, f"id{folder.parent.name}", {"identity": "ffff"}, said.append
    ), said


def test_a_server_that_does_not_answer_becomes_an_offline_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # the discard port: nothing listens there
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setattr(mirror, "INIT_TIMEOUT_S", 4)
    sink, said = _sink("online", tmp_path / "run")
    sink.write({"step": 1, "tokens": 10, "train/loss": 2.0})
    sink.finish({"state": "finished", "command": "optbench train data.files=[/secret/place]"}, exit_code=0)
    assert len(said) == 1
    assert said[0].startswith("W&B: online failed")
    (file,) = (tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb")
    assert [row["train/loss"] for row in wandb_file.history(file)] == [2.0]
    # The tests' own reader meets files whose end is not yet written: it has read a part, never a wrong record.
    whole, cut = wandb_file.written(file), tmp_path / "cut.wandb"
    for size in range(0, file.stat().st_size, 7):
        cut.write_bytes(file.read_bytes()[:size])
        part = wandb_file.written(cut)
        assert part == whole[: len(part)]
        assert len(part) < len(whole)
    assert "0" * 40 not in file.read_bytes().decode(errors="ignore")
    assert "/secret/place" not in file.read_bytes().decode(errors="ignore")


def test_a_relative_folder_is_the_processs_own_whatever_directory_wandb_began_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for place in ("first", "second"):
        (tmp_path / place).mkdir()
        monkeypatch.chdir(tmp_path / place)
        folder = Path("run")
        folder.mkdir()
        sink = mirror.WandbSink(_config("offline"), folder, f"{place}id", {}, pytest.fail)
        sink.write({"step": 1, "tokens": 10, "train/loss": 2.0})
        sink.finish({}, exit_code=0)
        (file,) = (tmp_path / place / "run" / "wandb").glob("offline-run-*/run-*.wandb")
        assert [row["train/loss"] for row in wandb_file.history(file)] == [2.0]
        assert str(tmp_path).encode() not in file.read_bytes()


def test_without_the_package_the_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # wandb is always installed here; its absence can only be acted.
    real = builtins.__import__

    def absent(
        name: str,
        globals: Mapping[str, object] | None = None,
        locals: Mapping[str, object] | None = None,
        fromlist: Sequence[str] | None = (),
        level: int = 0,
    ) -> ModuleType:
        if name == "wandb" and level == 0:
            raise ImportError("No module named 'wandb'")
        return real(name, globals, locals, fromlist or (), level)

    monkeypatch.setattr(builtins, "__import__", absent)
    sink, said = _sink("offline", tmp_path / "run")
    sink.write({"step": 1, "tokens": 10})
    sink.finish({}, exit_code=0)
    assert said == ["W&B: not available (No module named 'wandb'); the run folder has everything"]


def test_a_failure_in_the_middle_ends_the_mirror_and_is_said_once(tmp_path: Path) -> None:
    sink, said = _sink("offline", tmp_path / "run")
    run = sink._run

    class Full:
        def log(self, row: object, step: int) -> None:
            raise OSError("No space left on device")

    sink._run = Full()
    sink.write({"step": 1, "tokens": 1})
    sink.write({"step": 2, "tokens": 2})
    assert said == ["W&B: stopped mirroring (No space left on device); the run folder has everything"]
    run.finish()


def test_disabled_writes_nothing(tmp_path: Path) -> None:
    sink, said = _sink("disabled", tmp_path / "run")
    sink.write({"step": 1, "tokens": 1})
    sink.finish({}, exit_code=0)
    assert said == []
    assert list((tmp_path / "run").iterdir()) == []


def test_auto_is_online_only_for_those_who_are_logged_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    netrc = tmp_path / "netrc"
    monkeypatch.setenv("NETRC", str(netrc))
    assert mirror.resolve_mode("auto") == "offline"
    netrc.write_text("machine api.wandb.ai login user password secret\n")
    netrc.chmod(0o600)
    assert mirror.resolve_mode("auto") == "online"
    netrc.unlink()
    monkeypatch.setenv("WANDB_API_KEY", "x")
    assert mirror.resolve_mode("auto") == "online"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert mirror.resolve_mode("auto") == "disabled"
    assert mirror.resolve_mode("offline") == "offline"
