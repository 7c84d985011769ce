"""The walk-through of CONTRIBUTING.md: its three files, put where it says, are an optimizer."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

RUN = """
import sys
import optimizers.reference, optimizers.rules, tests.optimizers
from optimizers import presets

for package in (optimizers.reference, optimizers.rules, tests.optimizers):
    package.__path__.append(sys.argv[1] + "/" + package.__name__.replace(".", "/"))
presets._collect()
assert "torch" not in sys.modules
assert "row_beta" in presets.resolve("row_muon")
import pytest
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", sys.argv[1]]))
"""


def test_the_files_of_the_walk_through_make_an_optimizer(tmp_path: Path) -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    section = text.split("## A new optimizer")[1].split("\n## ")[0]
    files = re.findall(r"\*\*\d\. [^\n]*?`([\w/]+\.py)`.*?```python\n(.*?)```", section, flags=re.DOTALL)
    assert len(files) == 3
    for name, code in files:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(code, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "4 passed" in done.stdout
