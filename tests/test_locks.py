"""The lock files are complete: every dependency pinned with hashes, and what is installed is what they say."""

from __future__ import annotations

import hashlib
import importlib.util
import re
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
LOCKS = {
    "runtime": ROOT / "requirements.lock",
    "dev": ROOT / "requirements-dev.lock",
    "oracles": ROOT / "requirements-oracles.lock",
}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
RANGES = {"runtime": PROJECT["dependencies"], **PROJECT["optional-dependencies"]}


TOOL_LOCKS = {"TOOL_RANGES": ROOT / "requirements-tools.lock", "DOC_RANGES": ROOT / "requirements-docs.lock"}
"""Ranges in .ci/lock.py → the lock of an environment of its own."""


def pins(lock: Path) -> dict[str, tuple[str, list[str]]]:
    """Return package → (version, hashes) of a lock file."""
    found = {}
    for block in re.split(r"\n(?=[^\s#])", lock.read_text()):
        head = re.match(r"([\w.-]+)==([^\s\\;]+)", block)
        if head:
            hashes = re.findall(r"--hash=sha256:([0-9a-f]{64})\b", block)
            found[canonicalize_name(head[1])] = (head[2], hashes)
    return found


ALL = {name: pins(lock) for name, lock in LOCKS.items()}


@pytest.mark.parametrize("part", list(LOCKS))
def test_every_pin_has_hashes(part: str) -> None:
    assert ALL[part]
    assert [name for name, (_, hashes) in ALL[part].items() if not hashes] == []
    assert "torch" not in ALL[part], (
        "the machine decides which build of torch is taken, so it can't have a hash"
    )


@pytest.mark.parametrize("part", list(LOCKS))
def test_every_dependency_is_locked_within_its_range(part: str) -> None:
    known = {name: pin for pins_ in ALL.values() for name, (pin, _) in pins_.items()}
    torch = re.search(r"^torch==(\S+)", (ROOT / "requirements-torch.txt").read_text(), re.MULTILINE)
    assert torch is not None
    known["torch"] = torch[1]
    for requirement in map(Requirement, RANGES[part]):
        pinned = known.get(canonicalize_name(requirement.name))
        assert pinned is not None, f"{requirement} is in no lock file"
        assert requirement.specifier.contains(Version(pinned), prereleases=True), (
            f"{requirement} against {pinned}"
        )


@pytest.mark.parametrize("ranges", list(TOOL_LOCKS))
def test_tools_of_their_own_environment_are_locked_with_hashes(ranges: str) -> None:
    locked = pins(TOOL_LOCKS[ranges])
    assert [name for name, (_, hashes) in locked.items() if not hashes] == []
    for requirement in map(Requirement, getattr(_script("lock"), ranges)):
        pinned, _ = locked[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(Version(pinned)), f"{requirement} against {pinned}"


def test_no_package_is_locked_twice() -> None:
    names = [name for pins_ in ALL.values() for name in pins_]
    assert len(names) == len(set(names))


def test_the_environment_is_the_locked_one() -> None:
    wrong = []
    for pins_ in ALL.values():
        for name, (pinned, _) in pins_.items():
            try:
                installed = version(name)
            except PackageNotFoundError:
                installed = "missing"
            if installed != pinned:
                wrong.append(f"{name}: {installed}, locked {pinned}")
    assert wrong == [], "run make setup"


def test_the_installer_makes_pip_check_the_hashes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    install = _script("install")
    commands: list[list[str]] = []
    # A mock: the real installation takes minutes; the next test runs pip itself.
    monkeypatch.setattr(install.subprocess, "run", lambda command, **_: commands.append(command))
    monkeypatch.setattr(install.venv, "create", lambda *_, **__: None)
    monkeypatch.setattr(install, "has_gpu", lambda: True)
    monkeypatch.setattr(sys, "argv", ["install.py", str(tmp_path)])
    assert install.main() == 0
    (locked,) = [command for command in commands if str(LOCKS["runtime"]) in command]
    assert "--require-hashes" in locked
    assert {str(lock) for lock in LOCKS.values()} <= set(locked)
    # pip compiles nothing, then all cores compile everything.
    assert all("--no-compile" in command for command in commands if "install" in command)
    assert commands[-1][1:7] == ["-m", "compileall", "-qq", "-j", "0", "-x"]
    passed_over = re.compile(commands[-1][7])
    packages = "/v/lib/python3.11/site-packages"
    for name in (
        "pandas/tests/test_a.py",
        "scipy/stats/tests/a.py",
        "transformers/models/bert/modeling_bert.py",
    ):
        assert passed_over.search(f"{packages}/{name}"), name
    for name in ("transformers/models/llama/a.py", "transformers/models/__init__.py", "torch/testing/a.py"):
        assert not passed_over.search(f"{packages}/{name}"), name
    assert not passed_over.search(f"{ROOT}/harness/cli.py")


def test_the_installer_of_the_runtime_leaves_the_tools_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    install = _script("install")
    read: dict[str, str] = {}

    def run(command: list[str], **_: object) -> None:
        read.update({word: Path(word).read_text() for word in command if word.endswith(".lock")})

    monkeypatch.setattr(install.subprocess, "run", run)
    monkeypatch.setattr(install.venv, "create", lambda *_, **__: None)
    monkeypatch.setattr(install, "has_gpu", lambda: True)
    monkeypatch.setattr(sys, "argv", ["install.py", str(tmp_path), "--runtime"])
    assert install.main() == 0
    runtime, build = read
    assert runtime == str(LOCKS["runtime"])
    assert {line.partition("==")[0] for line in read[build].splitlines() if "==" in line} == set(
        install.BUILD
    )
    # Each with its hashes, so that pip checks these, too.
    assert all("--hash=sha256:" in entry for entry in read[build].split("\n\n")[0].split("==")[1:])
    with pytest.raises(AssertionError, match="not all of"):
        install.entries(read[build], ["ruff"])


def _script(name: str) -> ModuleType:
    """Return the module of a script in .ci/, which is not a package."""
    spec = importlib.util.spec_from_file_location(name, ROOT / ".ci" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("is_right", [True, False], ids=["right hash", "wrong hash"])
def test_pip_refuses_a_package_with_another_hash(is_right: bool, tmp_path: Path) -> None:
    wheel = tmp_path / "tiny-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("tiny.py", "")
        archive.writestr("tiny-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny\nVersion: 1.0\n")
        archive.writestr(
            "tiny-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr("tiny-1.0.dist-info/RECORD", "")
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest() if is_right else "0" * 64
    lock = tmp_path / "tiny.lock"
    lock.write_text(f"tiny==1.0 \\\n    --hash=sha256:{digest}\n")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--find-links", str(tmp_path)]
    done = subprocess.run(
        [*pip, "--require-hashes", "--no-deps", "--target", str(tmp_path / "site"), "-r", str(lock)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode == 0) is is_right, done.stderr
    assert (tmp_path / "site" / "tiny.py").exists() is is_right
