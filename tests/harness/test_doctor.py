"""`optbench doctor` on this machine, and what it says where something is wrong."""

from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path

import pytest
import torch

from harness import doctor
from harness.cli import main
from harness.errors import InputError


def test_this_machine_can_run(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["doctor", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    found = {finding["name"]: finding for finding in document["findings"]}
    assert document["schema_version"] == 1
    assert found["packages"]["verdict"] == "ok"
    assert found["engines ddp, fsdp2, hsdp"]["found"].startswith("gloo")
    assert found["GPUs"]["verdict"] == ("ok" if torch.cuda.is_available() else "missing")
    assert main(["doctor"]) == 0
    assert "offline" in capsys.readouterr().out


def test_a_package_out_of_its_range_is_named_with_the_range(monkeypatch: pytest.MonkeyPatch) -> None:
    version = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: "0.1" if name == "accelerate" else version(name))
    (finding,) = doctor._packages()
    assert (finding.name, finding.verdict) == ("accelerate", "broken")
    assert finding.found == "0.1, required >=1.10"
    assert finding.fix == 'pip install "accelerate>=1.10"'


def test_a_package_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    version = metadata.version

    def known(name: str) -> str:
        if name == "wandb":
            raise metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(metadata, "version", known)
    (finding,) = doctor._packages()
    assert finding.found.startswith("not installed, required")


def test_a_gpu_that_torch_cannot_use_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Acted: this machine has none."""
    if torch.cuda.is_available():
        pytest.skip("torch can use the GPU of this machine")
    monkeypatch.setattr(doctor, "visible_devices", lambda: 2)
    finding = next(doctor._devices())
    assert (finding.name, finding.verdict) == ("GPUs", "broken")
    assert "the driver shows 2" in finding.found


def test_a_file_where_runs_should_go_is_broken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "runs").write_text("in the way")
    monkeypatch.chdir(tmp_path)
    assert main(["doctor"]) == 1
    assert "runs cannot be written" in " ".join(capsys.readouterr().out.split())


def test_other_words_are_refused() -> None:
    with pytest.raises(InputError, match="is not an option"):
        doctor.main(["--jsn"])
