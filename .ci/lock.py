"""Write the lock files: exact versions and hashes of all that `make setup` installs, apart from torch.

`pip-compile` (pip-tools) resolves; versions that a lock file already holds are kept unless --upgrade is given. torch is
pinned in requirements-torch.txt without a hash, because the machine decides which build of it is taken, and pip takes
no unhashed package next to hashed ones.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TORCH = ROOT / "requirements-torch.txt"
RUNTIME = ROOT / "requirements.lock"
DEV = ROOT / "requirements-dev.lock"
ORACLES = ROOT / "requirements-oracles.lock"
TOOLS = ROOT / "requirements-tools.lock"
DOCS = ROOT / "requirements-docs.lock"

TOOL_RANGES = ["pip-tools>=7.4,<8", "cyclonedx-bom>=7,<8", "pip-audit>=2.7,<3"]
"""Packages behind `make lock`, `make sbom` and `make vulnerabilities`, in a virtual environment of their own."""

DOC_RANGES = [
    "mkdocs>=1.6,<2",
    "mkdocs-material>=9.6,<10",
    "mkdocstrings[python]>=1,<2",
    "latex2mathml>=3.78,<4",
    "ruff>=0.8",
]
"""Packages behind `make docs`, in a virtual environment of their own; ruff formats the signatures."""

HEADER = "# {content} Written by `make lock` from pyproject.toml; installed with pip's --require-hashes.\n"

Blocks = dict[str, str]
"""Normalized package name → its lines of a lock file: the pin, then one line per hash."""


def main() -> int:
    """Write every lock file; return 0."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--upgrade", action="store_true", help="take the newest versions within the ranges")
    upgrade = parser.parse_args().upgrade
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    known = {} if upgrade else _known()
    runtime = _compiled(project["dependencies"], known)
    dev = _compiled(extras["dev"], {**known, **runtime})
    oracles = _alone(extras["oracles"], known)
    tools = _compiled(TOOL_RANGES, {} if upgrade else parsed(TOOLS))
    docs = _compiled(DOC_RANGES, {} if upgrade else parsed(DOCS))
    _write(RUNTIME, "Runtime dependencies.", runtime)
    _write(DEV, "Development and test tools.", {k: v for k, v in dev.items() if k not in runtime})
    _write(ORACLES, "Peers that tests compare with.", oracles)
    _write(TOOLS, "Release tools.", tools)
    _write(DOCS, "Tools that build the documentation.", docs)
    return 0


def parsed(lock: Path) -> Blocks:
    """Return the blocks of a lock file; none if there is no such file."""
    if not lock.exists():
        return {}
    blocks: Blocks = {}
    for block in re.split(r"\n(?=\S)", lock.read_text(encoding="utf-8")):
        lines = [line for line in block.splitlines() if line and not line.lstrip().startswith("#")]
        if lines:
            # pip-compile's comments between the hashes and the next pin are dropped, and its last backslash with them.
            blocks[_normalized(lines[0].partition("==")[0])] = "\n".join(lines).rstrip(" \\") + "\n"
    return blocks


def _compiled(requirements: list[str], known: Blocks) -> Blocks:
    with tempfile.TemporaryDirectory() as scratch:
        source, pins, target = (Path(scratch) / name for name in ("source.in", "pins.txt", "locked.txt"))
        source.write_text("\n".join(requirements) + "\n", encoding="utf-8")
        constraints = [_pin(block) for block in known.values()]
        pins.write_text("\n".join([*constraints, TORCH.read_text(encoding="utf-8")]), encoding="utf-8")
        command = [sys.executable, "-m", "piptools", "compile", "--quiet", "--generate-hashes"]
        command += ["--strip-extras", "--no-header", "--no-annotate", "--no-emit-index-url"]
        command += ["--no-emit-find-links", "--no-emit-options", "--unsafe-package", "torch"]
        command += ["--constraint", str(pins), "--output-file", str(target), str(source)]
        subprocess.run(command, check=True)
        return parsed(target)


def _alone(requirements: list[str], known: Blocks) -> Blocks:
    """Pin packages without what they would bring: galore-torch asks for CUDA-only packages that no test needs."""
    blocks: Blocks = {}
    with tempfile.TemporaryDirectory() as scratch:
        pins = Path(scratch) / "pins.txt"
        pins.write_text("\n".join(_pin(block) for block in known.values()) + "\n", encoding="utf-8")
        for requirement in requirements:
            folder = Path(tempfile.mkdtemp(dir=scratch))
            pip = [
                sys.executable,
                "-m",
                "pip",
                "--disable-pip-version-check",
                "download",
                "--quiet",
                "--no-deps",
            ]
            subprocess.run([*pip, "--constraint", str(pins), "--dest", str(folder), requirement], check=True)
            (wheel,) = folder.glob("*.whl")
            name, version = wheel.name.split("-")[:2]
            digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
            blocks[_normalized(name)] = f"{_normalized(name)}=={version} \\\n    --hash=sha256:{digest}\n"
    return blocks


def _pin(block: str) -> str:
    return block.partition("\n")[0].rstrip(" \\")


def _known() -> Blocks:
    return {name: block for lock in (RUNTIME, DEV, ORACLES) for name, block in parsed(lock).items()}


def _write(lock: Path, content: str, blocks: Blocks) -> None:
    text = HEADER.format(content=content) + "".join(blocks[name] for name in sorted(blocks))
    lock.write_text(text, encoding="utf-8")


def _normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name.strip()).lower()


if __name__ == "__main__":
    sys.exit(main())
