"""`pip install ./packaging/optimizers`: the optimizers alone, which need torch and numpy and nothing else."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# What optbench needs and the optimizers do not; and optbench itself.
OTHERS = [
    "scipy",
    "deepspeed",
    "wandb",
    "transformers",
    "omegaconf",
    "hydra",
    "accelerate",
    "datasets",
    "pandas",
    "pyarrow",
    "pydantic",
    "sklearn",
    "plotly",
    "rich",
    "safetensors",
    "tokenizers",
    "psutil",
    "harness",
    "analysis",
]

WITHOUT = f"""
import sys

class Missing:
    # Nothing finds them, as where they are not installed; torch asks what is installed without importing it.
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in {OTHERS!r} else self.finder.find_spec(name, path, target)
    def __getattr__(self, name):
        return getattr(self.finder, name)

sys.meta_path[:] = [Missing(finder) for finder in sys.meta_path]
"""

TRAIN = """
import optimizers, torch
from optimizers import SUMO, GaLore, Muon, AdamW, momentum, orthogonalize, scale
from optimizers.linalg import robust

print(optimizers.__file__)
torch.manual_seed(0)
for name in optimizers.names():
    net = torch.nn.Sequential(torch.nn.Linear(8, 12), torch.nn.LayerNorm(12), torch.nn.Linear(12, 8))
    optimizer = optimizers.build(name, net.named_parameters(), modules=net, lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        net(torch.ones(4, 8)).square().mean().backward()
        optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    assert all(bool(p.isfinite().all()) for p in net.parameters()), name
# The last link of the chain is missing, and says so by giving up, not by raising.
assert robust.attempt(lambda: robust._gesvd(torch.ones(3, 2, dtype=torch.float64))) is None
assert not set(OTHERS) & {name.partition(".")[0] for name in sys.modules}
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(folder),
    ]
    done = subprocess.run(
        [*build, str(ROOT / "packaging" / "optimizers")],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (built,) = folder.glob("*.whl")
    return built


def test_it_holds_the_optimizers_and_needs_torch_and_numpy(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (metadata,) = [name for name in names if name.endswith("METADATA")]
        text = archive.read(metadata).decode()
    tops = {name.partition("/")[0] for name in names if ".dist-info/" not in name}
    assert tops == {"optimizers"}
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "optimizers").rglob("*.py")}
    assert sources == {name for name in names if name.endswith(".py")}
    assert "optimizers/py.typed" in names
    needs = re.findall(r"^Requires-Dist: ([\w-]+)[^;\n]*(;.*)?$", text, re.MULTILINE)
    assert {name for name, extra in needs if not extra} == {"torch", "numpy"}
    assert [name for name, extra in needs if extra] == ["scipy"]
    ours = re.search(
        r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert ours is not None
    assert f"Version: {ours[1]}\n" in text


def test_it_trains_where_nothing_else_is_installed(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    done = subprocess.run(
        [sys.executable, "-c", f"OTHERS = {OTHERS!r}\n{WITHOUT}\n{TRAIN}"],
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path / "site"), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert str(tmp_path) in done.stdout


def test_control_the_harness_does_need_more(tmp_path: Path) -> None:
    without = WITHOUT.replace("'harness', ", "")
    done = subprocess.run(
        [sys.executable, "-c", f"{without}\nimport harness.config.schema"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert "ModuleNotFoundError" in done.stderr
