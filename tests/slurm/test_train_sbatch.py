"""slurm/train.sbatch on a real Slurm: two nodes, two processes on each."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from tests.harness.running import small, write_documents
from tests.slurm import cluster

pytestmark = [
    pytest.mark.launch,
    pytest.mark.skipif(cluster.missing() is not None, reason=cluster.missing() or ""),
]
SCRIPT = Path(__file__).parents[2] / "slurm" / "train.sbatch"


def _submitted(
    slurm: cluster.Cluster, folder: Path, nodes: int, words: list[str]
) -> tuple[dict[str, str], str]:
    slurm.environment |= {
        "PROCESSES_PER_NODE": "2" if nodes > 1 else "1",
        "PATH": f"{Path(sys.executable).parent}:{slurm.environment['PATH']}",
        "PYTHONPATH": str(SCRIPT.parents[1]),
        "OPTBENCH_CACHE": os.environ["OPTBENCH_CACHE"],
        "GLOO_SOCKET_IFNAME": "lo",
    }
    job = slurm.submit(
        f"--nodes={nodes}", f"--output={folder}/job.out", "--cpus-per-task=2", str(SCRIPT), *words
    )
    facts = slurm.wait(job, timeout_s=200)
    return facts, (folder / "job.out").read_text()


def test_one_node_and_two_nodes_train(tmp_path: Path) -> None:
    corpus = write_documents(tmp_path)
    with cluster.Cluster(tmp_path / "slurm") as slurm:
        for nodes, world_size in ((1, 1), (2, 4)):
            runs = tmp_path / f"runs{nodes}"
            words = [word for word in small(corpus, runs) if not word.startswith("world_size")]
            facts, output = _submitted(slurm, tmp_path, nodes, words)
            assert facts["JobState"] == "COMPLETED", output
            (summary,) = (runs / "default").glob("*/summary.json")
            assert json.loads(summary.read_text())["world_size"] == world_size
            assert json.loads(summary.read_text())["state"] == "finished"


def test_a_mistyped_key_fails_the_job_with_its_line(tmp_path: Path) -> None:
    corpus = write_documents(tmp_path)
    words = [word for word in small(corpus, tmp_path, "optimzer.lr=1") if not word.startswith("world_size")]
    with cluster.Cluster(tmp_path / "slurm") as slurm:
        facts, output = _submitted(slurm, tmp_path, 1, words)
    assert facts["JobState"] == "FAILED"
    assert "optimzer.lr: 1" in output
    assert "did you mean optimizer.lr?" in output
