"""The scripts in slurm/ for people to copy: what the templates make of a plain cluster.

    python -m harness.jobs.examples     # writes them

A test keeps them equal to the templates. Torch-free.
"""

from __future__ import annotations

import sys

from harness.config.cluster import ClusterConfig
from harness.jobs.scripts import Job, Kind, render, template_root

_ADAPT = "Adapt the directives to your cluster; an option on sbatch's command line wins over them."
_CPUS = "On a cluster without GPUs give --export=ALL,PROCESSES_PER_NODE=2."
_MADE = "Made from slurm/templates; `optbench submit` makes one that fits your run and your cluster."
_CLUSTER = ClusterConfig(name="example", gpus=0, cpus=8, time="4h")
JOBS: dict[Kind, Job] = {
    "train": Job(
        name="optbench",
        about=(
            "One run on one or several nodes; it goes on by itself after preemption and at the time limit:",
            "",
            "  sbatch --nodes=2 --gpus-per-node=8 slurm/train.sbatch model=llama_60m optimizer=sumo steps=10000",
            "",
            f"Everything after the file's name goes to the run as it is. {_ADAPT}",
            _CPUS,
            _MADE,
        ),
    ),
    "sweep": Job(
        name="optbench-sweep",
        about=(
            "Many runs, one a row of a grid, at most four at a time:",
            "",
            "  sbatch --array=0-7%4 slurm/sweep.sbatch grid.jsonl",
            "",
            'A row: {"words": ["optimizer=sumo", "seed=1", "steps=1000"]}. Rows that are finished end at once.',
            _ADAPT,
            _CPUS,
            _MADE,
        ),
    ),
    "analysis": Job(
        name="optbench-analysis",
        about=(
            "Any optbench command on one node, for instance the report when an array (job 12) has ended:",
            "",
            "  sbatch --dependency=afterany:12 slurm/analysis.sbatch report runs/mine",
            "",
            _ADAPT,
            _MADE,
        ),
    ),
}


def texts() -> dict[str, str]:
    """File name → text, of all examples."""
    return {f"{kind}.sbatch": render(kind, job, _CLUSTER, by_hand=True) for kind, job in JOBS.items()}


def main() -> int:
    """Write them beside the templates."""
    for name, text in texts().items():
        (template_root().parent / name).write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
