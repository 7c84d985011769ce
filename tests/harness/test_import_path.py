"""A file of the working folder never runs in the place of a module of Python, of a library, or of this package."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from harness import import_path
from harness.config import compose
from harness.jobs import launch
from tests.harness.running import small, write_documents

ROOT = Path(__file__).resolve().parents[2]
NAMES = [
    "profile",
    "numbers",
    "json",
    "types",
    "statistics",
    "random",
    "torch",
    "numpy",
    "yaml",
    "rich",
    "accelerate",
]
PACKAGES = ["harness", "analysis", "optimizers", "transformers"]
LAUNCHER = "--multi_gpu --num_machines 1 --num_processes 2 --mixed_precision no --dynamo_backend no"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A working folder in which every file that is imported leaves its name, and a plug-in."""
    for name in NAMES:
        _decoy(tmp_path / f"{name}.py")
    for name in PACKAGES:
        (tmp_path / name).mkdir()
        _decoy(tmp_path / name / "__init__.py")
    (tmp_path / "myopt.py").write_text("import torch\nclass SignSGD(torch.optim.SGD):\n    pass\n")
    return tmp_path


def _decoy(path: Path) -> None:
    path.write_text(
        "import os\nopen(os.path.join(os.path.dirname(__file__), 'executed'), 'a').write(__name__ + ' ')\n"
    )


def _executed(folder: Path) -> str:
    return "".join(path.read_text() for path in folder.rglob("executed"))


def _python(folder: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *words],
        capture_output=True,
        text=True,
        cwd=folder,
        timeout=240,
        env={**os.environ, **environment},
        check=False,
    )


def test_control_python_itself_takes_the_files(folder: Path) -> None:
    _python(folder, "-c", "import profile, json, harness")
    assert set(_executed(folder).split()) == {"profile", "json", "harness"}


def test_workers_start_safely_from_any_folder(folder: Path, tmp_path: Path) -> None:
    """What `launch.start` and the shared processes are started with, without the cost of a run."""
    words, extra = launch.launch_command(compose.load(["world_size=1"]), [], tmp_path)
    code = "import harness.train, profile, numbers, json, sys; print(harness.__file__); print(sys.path[-1])"
    done = _python(folder, "-P", "-c", code, **launch.environment(), **extra)
    assert done.returncode == 0, done.stderr
    assert words[1:4] == ["-P", "-m", "harness.train"]
    assert done.stdout.splitlines()[0] == str(ROOT / "harness" / "__init__.py")
    # A process below it that forgets the flag, as accelerate's and multiprocessing's do.
    done = _python(folder, "-m", "harness.train", "no_such_key=1", **launch.environment())
    assert done.returncode == 2, done.stderr
    assert _executed(folder) == ""


@pytest.mark.parametrize("name", ["profile", "numbers", "fnmatch", "statistics", "textwrap", "string"])
def test_python_m_harness_train_moves_the_folder_last(name: str, tmp_path: Path) -> None:
    """Started without -P, as by accelerate launch; the plug-in next to it is found."""
    _decoy(tmp_path / f"{name}.py")
    (tmp_path / "myopt.py").write_text("import torch\nclass SignSGD(torch.optim.SGD):\n    pass\n")
    words = ["optimizer.target=myopt.SignSGD", "optimizer.lr=0.1", "no_such_key=1"]
    done = _python(tmp_path, "-m", "harness.train", *words, PYTHONPATH=str(ROOT))
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines()[-1].startswith("no_such_key")
    if (executed := _executed(tmp_path)) != "":
        # What `python -m` imports before it reaches this package is out of reach, and refused.
        assert f"{name}.py hides Python's own module" in done.stderr, executed


def test_a_module_that_python_m_itself_took_from_the_folder_is_named(tmp_path: Path) -> None:
    """It ran before this package could keep it away."""
    shutil.copy(Path(os.__file__).with_name("types.py"), tmp_path)
    done = _python(tmp_path, "-m", "harness.train", "no_such_key=1", PYTHONPATH=str(ROOT))
    assert done.returncode == 2
    assert f"{tmp_path / 'types.py'} hides Python's own module types; fix: rename it" in done.stderr
    done = _python(tmp_path, "-P", "-m", "harness.train", "no_such_key=1", PYTHONPATH=str(ROOT))
    assert done.stderr.splitlines()[-1].startswith("no_such_key"), done.stderr


@pytest.mark.parametrize("given", ["", ":/elsewhere", ".", "relative:/elsewhere", "/elsewhere"])
def test_relative_entries_of_pythonpath_are_not_passed_on(
    given: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An empty entry, as `PYTHONPATH=$PYTHONPATH:/x` leaves it, is the working folder."""
    monkeypatch.setenv("PYTHONPATH", given)
    environment = import_path.environment()
    assert environment["PYTHONSAFEPATH"] == "1"
    entries = environment["PYTHONPATH"].split(":")
    assert entries == [str(ROOT)] + (["/elsewhere"] if "/elsewhere" in given else [])


def test_who_imports_the_package_keeps_a_path_of_their_own(tmp_path: Path) -> None:
    done = _python(
        tmp_path, "-c", "import harness, sys, os; print(sys.path[0] == '', 'PYTHONSAFEPATH' in os.environ)"
    )
    assert done.stdout.split() == ["True", "False"], done.stderr


@pytest.mark.launch
@pytest.mark.slow
def test_whole_runs_with_a_plug_in_next_to_the_decoys(
    folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    scratch = tmp_path_factory.mktemp("runs")
    words = small(
        write_documents(scratch), scratch, "optimizer.target=myopt.SignSGD", "optimizer.lr=0.1", "steps=2"
    )
    words = [word for word in words if not word.startswith("world_size")]
    script = Path(sys.executable).with_name("optbench")
    for world in (1, 2):
        done = subprocess.run(
            [sys.executable, str(script), "train", *words, f"world_size={world}", f"name=w{world}"],
            capture_output=True,
            text=True,
            cwd=folder,
            timeout=240,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            check=False,
        )
        assert done.returncode == 0, done.stderr
    for name in ("accelerate", "torch", "types", "json", "random", "numbers", "yaml"):
        # Those that its own workers import before this package: only the launcher's user can keep them away.
        (folder / f"{name}.py").unlink()
    (folder / "harness" / "__init__.py").unlink()
    (folder / "harness").rmdir()
    accelerate = str(Path(sys.executable).with_name("accelerate"))
    launch_words = [
        accelerate,
        "launch",
        *LAUNCHER.split(),
        "--main_process_port=29731",
        "-m",
        "harness.train",
    ]
    words += ["world_size=2", "name=bare"]
    done = _python(folder, *launch_words, *words, ACCELERATE_USE_CPU="true", PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stderr
    assert "finished: all steps done" in done.stdout
    assert str(scratch / "default" / "bare") in done.stdout
    assert _executed(folder) == ""
