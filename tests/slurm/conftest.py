"""One cluster for all tests of a process."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.harness import warm
from tests.harness.running import small, write_documents
from tests.slurm import cluster
from tests.slurm.cluster import Cluster

ROOT = Path(__file__).parents[2]


@dataclass
class Lab:
    """A cluster, a corpus, and a folder for runs."""

    slurm: Cluster
    corpus: Path
    runs: Path

    def words(self, *overrides: str) -> list[str]:
        """A small run on the cluster's pretended nodes."""
        words = [*small(self.corpus, self.runs, *overrides), "cluster=local_ci"]
        return [word for word in words if not word.startswith("world_size")]

    def optbench(self, *words: str, code: int = 0) -> tuple[str, str]:
        """A command; what it wrote on standard output and standard error."""
        done = warm.run(*words, env=self.slurm.environment)
        assert done.returncode == code, f"{words}: code {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout, done.stderr

    def submit(self, *words: str) -> dict[str, Any]:
        """`optbench submit --json`."""
        return json.loads(self.optbench("submit", *words, "--json")[0])

    def status(self, folder: Path) -> dict[str, dict[str, Any]]:
        """`optbench status --json`: run → what it says of it."""
        document = json.loads(self.optbench("status", str(folder), "--json")[0])
        return {run["name"].split("/")[-1]: run for run in document["runs"]}


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory, session_cache: Path) -> Iterator[Lab]:
    folder = tmp_path_factory.mktemp("slurm")
    slurm = Cluster(folder / "state")
    # A job finds what the shell that submits it finds.
    slurm.environment |= {
        "PATH": f"{Path(sys.executable).parent}:{slurm.environment['PATH']}",
        "PYTHONPATH": str(ROOT),
        "OPTBENCH_CACHE": str(session_cache),
        "GLOO_SOCKET_IFNAME": "lo",
        # Reports without a picture: tests/analysis/report has a browser.
        "CHROMIUM": "none",
    }
    with slurm:
        yield Lab(slurm, write_documents(folder), folder / "runs")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = cluster.missing()
    for item in items:
        if reason is not None and "lab" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.skip(reason=reason))
