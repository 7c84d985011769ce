"""Every module imports with no CUDA, no network and no files written; packages import in one direction."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = {"optimizers": 0, "harness": 1, "analysis": 2}

PROGRAM = """
import importlib, socket, sys
def refuse(*args, **kwargs): raise RuntimeError("network at import")
socket.socket.connect = refuse
socket.create_connection = refuse
socket.getaddrinfo = refuse
for name in sys.argv[1:]:
    importlib.import_module(name)
import torch
assert not torch.cuda.is_initialized()
"""


def _modules() -> list[tuple[str, Path]]:
    return [
        (".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"), path)
        for package in PACKAGES
        for path in sorted((ROOT / package).rglob("*.py"))
    ]


def test_every_module_imports_without_network_and_cuda() -> None:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    names = [name for name, _ in _modules()]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *names],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr


def test_imports_run_one_way() -> None:
    wrong = []
    for name, path in _modules():
        level = PACKAGES[name.split(".")[0]]
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                names = [node.module]
            wrong += [
                f"{name} imports {other}" for other in names if PACKAGES.get(other.split(".")[0], -1) > level
            ]
    assert wrong == []
