"""A user's own rule, from the file that the page shows to a comparison report: no line of this repository changes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.harness.running import small, write_documents

ROOT = Path(__file__).resolve().parents[3]
PAGE = ROOT / "docs" / "optimizers.md"

PROJECT = """
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "my-package"
version = "1.0"

{entry_point_group}
{entry_point}

[tool.hatch.build.targets.wheel]
include = ["my_package.py"]
"""


def from_the_page() -> tuple[str, str, str]:
    """The rule's file, and the two lines of pyproject.toml that make it known."""
    section = PAGE.read_text().split("## A rule of your own")[1]
    blocks = re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL)
    group, line = re.findall(r"`(\[project\.entry-points\.[^`]+\])` `([^`]+)`", section)[0]
    return blocks[0], group, line


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which pip has installed the user's package, in front of which stands nothing of ours."""
    package = tmp_path_factory.mktemp("package")
    rule, group, line = from_the_page()
    (package / "my_package.py").write_text(rule)
    (package / "pyproject.toml").write_text(PROJECT.format(entry_point_group=group, entry_point=line))
    folder = tmp_path_factory.mktemp("site")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
    subprocess.run(
        [*pip, "--no-build-isolation", "--disable-pip-version-check", "--target", folder, package],
        check=True,
        timeout=120,
    )
    return folder


def optbench(site: Path | None, *words: str) -> subprocess.CompletedProcess[str]:
    paths = [str(ROOT)] if site is None else [str(site), str(ROOT)]
    own = {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "CHROMIUM": "none"}  # no picture
    return subprocess.run(
        [sys.executable, "-m", "harness.cli", *words],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, **own},
        check=False,
    )


def test_the_rule_on_the_page_has_at_most_20_lines() -> None:
    rule, _, _ = from_the_page()
    assert 10 < len([line for line in rule.splitlines() if line.strip()]) <= 20


@pytest.mark.slow
@pytest.mark.launch
def test_from_the_file_to_the_report(site: Path, tmp_path: Path) -> None:
    words = small(
        write_documents(tmp_path),
        tmp_path / "runs",
        "group=own",
        "seeds=1",
        "steps=40",
        "schedule.warmup=4",
        "adamw.lr=0.01",
        "unit_velocity.lr=0.02",
        "unit_velocity.momentum=0.8",
    )
    result = optbench(site, "compare", "unit_velocity", "adamw", *words, "--json")
    assert result.returncode == 0, result.stderr
    runs = {run["optimizer"]: run for run in json.loads(result.stdout)["runs"]}
    assert {name: run["state"] for name, run in runs.items()} == {
        "unit_velocity": "finished",
        "adamw": "finished",
    }
    root = tmp_path / "runs" / "own"
    for name in ("report.html", "comparison.md", "comparison.csv"):
        assert "unit_velocity" in (root / name).read_text(), name

    own = root / runs["unit_velocity"]["folder"]
    taken = {row["name"]: row["rule"] for row in json.loads((own / "parameters.json").read_text())}
    assert {name for name, rule in taken.items() if rule == "unit_velocity"} == {
        name for name in taken if "_proj" in name
    }
    assert "momentum: 0.8" in (own / "config.yaml").read_text()
    rows = [json.loads(line) for line in (own / "metrics.jsonl").read_text().splitlines()]
    losses = [row["val/loss"] for row in rows if "val/loss" in row]
    assert losses[-1] < losses[0] - 0.5, losses
    # A rule gets its spectra without a line for them.
    assert any("moments/condition_number/median" in row for row in rows)


def test_without_the_package_the_name_is_refused() -> None:
    """Negative control: nothing here knows the rule."""
    result = optbench(None, "compare", "unit_velocity", "adamw")
    assert result.returncode == 2
    assert "unit_velocity" in result.stderr
