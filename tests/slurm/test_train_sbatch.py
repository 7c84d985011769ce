"""slurm/train.sbatch and slurm/analysis.sbatch as people use them: by hand, on a real Slurm."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.slurm.conftest import ROOT, Lab

pytestmark = pytest.mark.launch


def _submitted(
    lab: Lab, output: Path, script: str, *words: str, flags: tuple[str, ...] = ()
) -> tuple[str, str]:
    job = lab.slurm.submit(
        f"--output={output}", "--cpus-per-task=2", *flags, str(ROOT / "slurm" / script), *words
    )
    state = lab.slurm.wait(job, timeout_s=240)["JobState"]
    return state, output.read_text()


def test_a_run_and_a_command_by_hand(lab: Lab, tmp_path: Path) -> None:
    words = [word for word in lab.words(f"runs_dir={tmp_path}", "name=hand") if "cluster" not in word]
    state, output = _submitted(lab, tmp_path / "train.out", "train.sbatch", *words)
    assert state == "COMPLETED", output
    run = tmp_path / "default" / "hand"
    facts = json.loads((run / "summary.json").read_text())
    assert (facts["world_size"], facts["state"]) == (1, "finished")
    # Not submitted by optbench, and yet known to it.
    assert lab.status(tmp_path)["hand"]["job"] is not None
    state, output = _submitted(
        lab, tmp_path / "status.out", "analysis.sbatch", "status", str(tmp_path), "--json"
    )
    assert state == "COMPLETED", output
    assert '"state": "finished"' in output


def test_a_mistyped_key_fails_the_job_with_its_line(lab: Lab, tmp_path: Path) -> None:
    words = [word for word in lab.words(f"runs_dir={tmp_path}", "optimzer.lr=1") if "cluster" not in word]
    state, output = _submitted(lab, tmp_path / "train.out", "train.sbatch", *words)
    assert state == "FAILED"
    assert "optimzer.lr: 1" in output
    assert "did you mean optimizer.lr?" in output
