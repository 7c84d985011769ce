"""docs/notebook.ipynb: every cell runs, in order, in a fresh process and an empty folder.

Not by a Jupyter kernel: the cells are plain Python, and nbclient with ipykernel would bring two dozen packages.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = ROOT / "docs" / "notebook.ipynb"

RUNNER = """
import ast, json, sys
names = {}
for number, source in enumerate(json.loads(sys.argv[1]), 1):
    tree = ast.parse(source, f"cell {number}")
    last = tree.body[-1]
    is_shown = isinstance(last, ast.Expr)
    if is_shown:
        tree.body.pop()
    exec(compile(tree, f"cell {number}", "exec"), names)
    if is_shown:
        value = eval(compile(ast.Expression(last.value), f"cell {number}", "eval"), names)
        print(value, flush=True)
assert "torch" not in sys.modules
"""


def _sources() -> list[str]:
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    return ["".join(cell["source"]) for cell in cells]


def _run(sources: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", RUNNER, json.dumps(sources)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=250, check=False)


def test_the_notebook_is_stored_without_outputs() -> None:
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert notebook["nbformat"] == 4
    for cell in notebook["cells"]:
        assert cell["cell_type"] == "markdown" or (cell["outputs"], cell["execution_count"]) == ([], None)


@pytest.mark.launch
@pytest.mark.slow  # half a minute of training; `make docs-check` runs it
def test_every_cell_of_the_notebook_runs(tmp_path: Path) -> None:
    done = _run(_sources(), tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "did you mean steps" in done.stdout
    assert (tmp_path / "runs" / "notebook" / "report.html").is_file()
    assert {p.name for p in (tmp_path / "runs" / "notebook").glob("*-seed0")} == {"adamw-seed0", "sumo-seed0"}


def test_control_a_cell_that_fails_is_seen(tmp_path: Path) -> None:
    done = _run(["x = 1", "from harness import no_such_function"], tmp_path)
    assert done.returncode != 0
    assert "cell 2" in done.stderr
