"""optbench works from a folder that has its own `optimizers/`, `analysis/` and `configs/`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def decoys(tmp_path: Path) -> Path:
    for name in ("optimizers", "analysis"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise RuntimeError('the decoy was imported')\n")
    (tmp_path / "configs" / "model").mkdir(parents=True)
    (tmp_path / "configs" / "model" / "mine.yaml").write_text("name: mine\nconfig: {hidden_size: 64}\n")
    return tmp_path


def python(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *words],
        capture_output=True,
        text=True,
        cwd=folder,
        timeout=120,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
        check=False,
    )


def test_a_module_run_from_there_uses_our_packages(decoys: Path) -> None:
    result = python(decoys, "-m", "harness.cli", "show", "sumo")
    assert result.returncode == 0, result.stderr
    assert "optimizer.update_scale" in result.stdout
    result = python(decoys, "-m", "harness.cli", "train", "model=mine", "optimizer=sumoo")
    assert result.stderr.splitlines()[-1].startswith("optimizer: sumoo is wrong; did you mean sumo?")


def test_the_decoy_would_have_been_imported(decoys: Path) -> None:
    # Negative control: without harness the current folder wins.
    result = python(decoys, "-c", "import optimizers")
    assert "the decoy was imported" in result.stderr


def test_pinning_imports_nothing(decoys: Path) -> None:
    code = "import sys, harness; print(sorted({'torch', 'optimizers', 'analysis'} & set(sys.modules)))"
    assert python(decoys, "-c", code).stdout.strip() == "[]"
    code = "import harness, optimizers.presets, analysis; print(optimizers.__file__, analysis.__path__)"
    result = python(decoys, "-c", code)
    assert result.returncode == 0, result.stderr
    assert str(decoys) not in result.stdout


def test_a_foreign_package_that_came_first_is_named(tmp_path: Path) -> None:
    (tmp_path / "optimizers").mkdir()
    (tmp_path / "optimizers" / "__init__.py").write_text("")
    result = python(tmp_path, "-c", "import optimizers, harness")
    assert "ImportError: the package 'optimizers' was already imported from" in result.stderr
    assert str(tmp_path) in result.stderr
