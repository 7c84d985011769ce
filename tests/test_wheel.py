"""The wheel that `pip wheel .` builds, in an environment that has never seen this checkout, from a folder with packages
and configurations of the same names."""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def run(*words: object, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(word) for word in words],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=240,
        env={"PATH": "/usr/bin:/bin", "HOME": str(folder), "OMP_NUM_THREADS": "1", **environment},
        check=False,
    )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    done = run(*build, "-w", folder, ROOT, folder=folder)
    assert done.returncode == 0, done.stderr
    (built,) = folder.glob("optbench-*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """bin/ of a new environment: the wheel installed, what it needs taken from the environment of the tests."""
    place = tmp_path_factory.mktemp("env") / "env"
    venv.create(place, with_pip=False)
    python = place / "bin" / "python"
    site = Path(
        run(python, "-c", "import site; print(site.getsitepackages()[0])", folder=place).stdout.strip()
    )
    # Added by path and not by site: the checkout's own editable installation must not come along.
    (site / "needs.pth").write_text(sysconfig.get_path("purelib") + "\n")
    done = run(
        sys.executable,
        "-m",
        "pip",
        "--python",
        python,
        "install",
        "--quiet",
        "--no-deps",
        wheel,
        folder=place,
    )
    assert done.returncode == 0, done.stderr
    return place / "bin"


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """A user's folder that happens to have our names in it."""
    for name in ("optimizers", "analysis"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise RuntimeError('the decoy was imported')\n")
    (tmp_path / "configs" / "model").mkdir(parents=True)
    (tmp_path / "configs" / "model" / "mine.yaml").write_text(
        "name: mine\nconfig: {vocab_size: 4096, hidden_size: 32, intermediate_size: 48, num_hidden_layers: 1, "
        "num_attention_heads: 2, num_key_value_heads: 2}\n"
    )
    return tmp_path


def test_what_is_in_it(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.partition("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"optimizers", "harness", "analysis"}
    for needed in (
        "harness/configs/optbench.yaml",
        "harness/configs/accelerate/ddp_gpu.yaml",
        "harness/configs/cluster/generic_gpu.yaml",
        "harness/configs/paper/sumo_table3.yaml",
        "harness/configs/study/quickstart.yaml",
        "harness/slurm/templates/train.sbatch.j2",
        "harness/record/certificates.json",
        "analysis/report/templates/report.html.j2",
    ):
        assert needed in names
    assert not [name for name in names if "test" in name.split("/")[0]]


def test_it_is_the_installed_one_that_runs(installed: Path, elsewhere: Path) -> None:
    where = run(
        installed / "python", "-c", "import harness; print(harness.__file__)", folder=elsewhere.parent
    )
    assert str(installed.parent) in where.stdout
    shown = run(installed / "optbench", "list", "--json", folder=elsewhere)
    assert shown.returncode == 0, shown.stderr
    assert "mine" in [model["name"] for model in json.loads(shown.stdout)["models"]]


@pytest.mark.slow
def test_it_trains_from_there(installed: Path, elsewhere: Path, session_cache: Path) -> None:
    words = ["model=mine", "optimizer=sumo", "optimizer.rank=8", "steps=2", "batch_size=2", "seq_len=32"]
    more = ["world_size=2", "eval.tokens=64", "wandb.mode=disabled", "name=run", "--json"]
    cache = {"OPTBENCH_CACHE": str(session_cache), "HF_HUB_OFFLINE": "1"}
    done = run(installed / "optbench", "train", *words, *more, folder=elsewhere, **cache)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["state"] == "finished"
    assert (elsewhere / "runs" / "default" / "run" / "DONE").exists()
    report = run(installed / "optbench", "report", "runs", folder=elsewhere, **cache)
    assert report.returncode == 0, report.stderr
    assert (elsewhere / "runs" / "report.html").stat().st_size > 100_000
