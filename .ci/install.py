"""Create the virtual environment from the lock files, whose hashes pip checks.

Only the standard library: it runs before anything is installed.

On a machine without an NVIDIA GPU it makes sure that torch is a CPU build: the default Linux wheel for x86-64
brings several GB of CUDA libraries that could not even be used.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import venv
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TORCH = ROOT / "requirements-torch.txt"
RUNTIME, DEV, ORACLES = (ROOT / f"requirements{part}.lock" for part in ("", "-dev", "-oracles"))
BUILD = ("editables", "hatchling", "pathspec", "pluggy", "trove-classifiers")
"""The packages of the development lock that install this project itself."""
NEVER_IMPORTED = r"/site-packages/.*/tests/|/transformers/models/(?!auto/|llama/)[^/]+/"
"""Files that most programs never import, a quarter of all: other packages' tests and the model zoo. What is imported
all the same is compiled then."""


def main() -> int:
    """Install everything and return the exit code of the process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("venv", type=Path)
    parser.add_argument("--torch-index", help="package index to take torch from")
    parser.add_argument(
        "--runtime", action="store_true", help="only what training and reports need, no tools or tests"
    )
    arguments = parser.parse_args()
    if sys.version_info < (3, 11):
        print(
            f"python: {platform.python_version()} is too old; allowed: 3.11 or newer; fix: make PYTHON=python3.11 setup"
        )
        return 2
    if not (arguments.venv / "bin" / "python").exists():
        venv.create(arguments.venv, with_pip=True)
    pip = [
        str(arguments.venv / "bin" / "python"),
        "-m",
        "pip",
        "--disable-pip-version-check",
        "install",
        "--no-deps",
        # pip would compile with one core; see below.
        "--no-compile",
    ]
    torch = re.search(r"^torch==\S+", TORCH.read_text(), re.MULTILINE)
    assert torch is not None, "requirements-torch.txt pins no torch"
    index = ["--index-url", arguments.torch_index] if arguments.torch_index else []
    if not index and not has_gpu() and would_be_cuda(pip, torch.group()):
        print(
            f"torch: the only {torch.group()} that pip finds is a CUDA build of several GB, "
            "and this machine has no NVIDIA GPU; "
            "fix: make TORCH_INDEX=URL setup with the CPU index shown on pytorch.org under Get Started "
            "(or TORCH_INDEX=your default index, to take the CUDA build)"
        )
        return 2
    subprocess.run([*pip, "--quiet", *index, torch.group()], check=True)
    # A package whose hash is not in its lock file stops the installation here. torch cannot be among them: the
    # machine decides which build of it is taken, and pip exempts no single package.
    with tempfile.TemporaryDirectory() as scratch:
        locks = [RUNTIME, DEV, ORACLES]
        if arguments.runtime:
            locks = [RUNTIME, Path(scratch) / "build.lock"]
            locks[1].write_text(entries(DEV.read_text(), BUILD))
        words = [word for lock in locks for word in ("-r", str(lock))]
        subprocess.run([*pip, "--quiet", "--require-hashes", *words], check=True)
    subprocess.run([*pip, "--quiet", "--no-build-isolation", "-e", str(ROOT)], check=True)
    # Bytecode, on all cores: else the first start of each program would write it. Some packages hold
    # files for other Pythons, which do not compile and are never imported.
    folders = [*map(str, arguments.venv.glob("lib/python*/site-packages"))]
    folders += [str(ROOT / name) for name in ("optimizers", "harness", "analysis")]
    compiling = [pip[0], "-m", "compileall", "-qq", "-j", "0", "-x", NEVER_IMPORTED, *folders]
    subprocess.run(compiling, check=False)
    return 0


def entries(lock: str, names: Sequence[str]) -> str:
    """Return the entries of some packages, with their hashes, from the text of a lock file."""
    found = re.findall(r"^[\w.-]+==[^\n]*(?:\n[ \t]+[^\n]*)*\n?", lock, re.MULTILINE)
    kept = [entry for entry in found if entry.partition("==")[0] in names]
    assert len(kept) == len(names), f"not all of {', '.join(names)} are locked"
    return "".join(kept)


def has_gpu() -> bool:
    """Whether an NVIDIA driver answers."""
    smi = shutil.which("nvidia-smi")
    return smi is not None and subprocess.run([smi, "-L"], capture_output=True).returncode == 0


def would_be_cuda(pip: list[str], torch: str) -> bool:
    """Whether pip would take a CUDA build: on x86-64 Linux every wheel that does not say +cpu."""
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return False
    report = subprocess.run(
        [*pip, "--quiet", "--dry-run", "--ignore-installed", "--report", "-", torch],
        capture_output=True,
        text=True,
        check=True,
    )
    return all("+cpu" not in item["metadata"]["version"] for item in json.loads(report.stdout)["install"])


if __name__ == "__main__":
    sys.exit(main())
