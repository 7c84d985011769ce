"""Render batch scripts from the templates in slurm/templates/.

    python -m harness.jobs.scripts     # writes slurm/*.sbatch, the examples for people to copy

A test keeps the examples equal to the templates. Torch-free.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import jinja2

from harness import import_path
from harness.config import cluster as cluster_config
from harness.config.cluster import ClusterConfig
from harness.errors import InputError
from harness.jobs.launch import ACCELERATE_CONFIG
from harness.process import gpu_environment

Kind = Literal["train", "sweep", "analysis"]


@dataclass(frozen=True)
class Job:
    """Values of one batch script.

    Attributes:
        name: of the job, in SLURM's listings.
        about: comment lines at the top.
        output: file of the job's output, in SLURM's notation (``%j``).
        folder: working folder of the job; None: the one that it is submitted from.
        words: arguments of the run or the command; None: what follows the script on sbatch's command line.
        run: folder of the run (train).
        grid: file of the grid (sweep); None: as for ``words``.
        array: rows of the grid to run, in the form of sbatch's --array (sweep).
        script: path of this script, for submitting it again.
        successors, dependents: files of job numbers: jobs submitted in place of this one, jobs that wait for it.
    """

    name: str
    about: Sequence[str]
    output: str = "%x-%j.out"
    folder: str | None = None
    words: Sequence[str] | None = None
    run: str | None = None
    grid: str | None = None
    array: str | None = None
    script: str | None = None
    successors: str | None = None
    dependents: str | None = None


def template_root() -> Path:
    """Return the folder of the templates: inside the package in a wheel, next to it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    inside = package / "slurm" / "templates"
    return inside if inside.is_dir() else package.parent / "slurm" / "templates"


def render(kind: Kind, job: Job, cluster: ClusterConfig, *, by_hand: bool = False) -> str:
    """Return the text of a batch script.

    Args:
        kind: name of the template.
        job: what the script does.
        cluster: resources that it asks for.
        by_hand: render an example for people to adapt: it counts processes on the node and takes the first ``python``
            on PATH.

    Raises:
        InputError: a value that no script may hold: a control character, or a secret.
    """
    _check(job)
    template = _environment(template_root()).get_template(f"{kind}.sbatch.j2")
    text = template.render(job=job, cluster=_cluster_values(kind, cluster, by_hand=by_hand))
    return _without_double_blanks(text)


@lru_cache
def _environment(root: Path) -> jinja2.Environment:
    """Return the templates of a folder: compiled once, however many scripts are rendered."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(root),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # what goes to the shell is quoted by q and words
    )
    # sbatch, other than a shell, takes a backslash inside of quotes for an escape.
    environment.filters["directive"] = lambda value: shlex.quote(str(value)).replace("\\", "\\\\")
    environment.filters["q"] = lambda value: shlex.quote(str(value))
    environment.filters["words"] = lambda values: shlex.join(map(str, values))
    environment.filters["inner"] = lambda text: text.replace("'", "'\\''")
    return environment


def array_of(rows: Iterable[int], throttle: int | None) -> str:
    """Return rows in the form of sbatch's --array: ``0-2,5%4``.

    Raises:
        ValueError: no rows.
    """
    ordered = sorted(set(rows))
    if not ordered:
        raise ValueError("no rows")
    spans: list[list[int]] = []
    for row in ordered:
        if spans and spans[-1][1] == row - 1:
            spans[-1][1] = row
        else:
            spans.append([row, row])
    text = ",".join(str(first) if first == last else f"{first}-{last}" for first, last in spans)
    return f"{text}%{throttle}" if throttle else text


def output_path(folder: Path, pattern: str) -> str:
    """Return the path of a job's output for SLURM: a % is special in ``pattern`` and literal in ``folder``."""
    return f"{str(folder).replace('%', '%%')}/{pattern}"


def check_words(words: Iterable[str]) -> None:
    """Refuse arguments of a run or a command that no script may hold.

    Raises:
        InputError: a control character or a secret.
    """
    for word in words:
        key = ascii(word.partition("=")[0])[1:-1] if "=" in word else "argument"
        cluster_config.check_text(key, word)
        cluster_config.check_open(key, word)


def check_folder(folder: Path | str) -> None:
    """Refuse a folder of a run or a group whose path no script may hold.

    Raises:
        InputError: a control character or a secret.
    """
    cluster_config.check_text("runs_dir", str(folder))
    cluster_config.check_open("runs_dir", str(folder))


def _check(job: Job) -> None:
    check_words([*(job.words or ()), *job.about])
    for path in (job.output, job.run, job.grid, job.script, job.successors, job.dependents):
        if path is not None:
            check_folder(path)
    cluster_config.check_text("name", job.name)
    cluster_config.check_text("working folder", job.folder or "")


def _cluster_values(kind: Kind, cluster: ClusterConfig, *, by_hand: bool) -> dict[str, Any]:
    preflight = cluster.preflight
    is_ours = not (cluster.python or cluster.container or cluster.srun)
    python = cluster.python or ("python" if by_hand or cluster.container else sys.executable)
    return {
        "flags": _flags(kind, cluster),
        "modules": cluster.modules,
        "env": cluster.env,
        "setup": cluster.setup,
        "container": cluster.container,
        "python": python,
        "import_path": None if by_hand or not is_ours else import_path.checkout(),
        "srun": cluster.srun,
        "gpus": cluster.gpus,
        "per_node": None if by_hand else cluster.processes_per_node,
        "grace_s": cluster.grace_s,
        "max_restarts": cluster.max_restarts,
        "idle_attempts": cluster.idle_attempts,
        "address_suffix": cluster.address_suffix,
        "accelerate_config": ACCELERATE_CONFIG,
        "launcher_environment": gpu_environment.of_launcher({}),
        "exclude_bad_nodes": cluster.exclude_bad_nodes,
        "preflight": {
            "enabled": preflight.enabled and (by_hand or cluster.nodes > 1),
            "flags": [
                f"--gpus={-1 if by_hand else cluster.gpus}",
                f"--seconds={preflight.seconds:g}",
                f"--min-gb-per-s={preflight.min_gb_per_s:g}",
                f"--min-share={preflight.min_share:g}",
                f"--min-free-gb={preflight.min_free_gb:g}",
                f"--max-skew-s={preflight.max_skew_s:g}",
                f"--timeout-s={preflight.timeout_s:g}",
            ],
        },
    }


def _flags(kind: Kind, cluster: ClusterConfig) -> dict[str, str | int | None]:
    """Return the #SBATCH directives in a fixed order; an analysis takes one node and no GPUs."""
    is_run = kind != "analysis"
    flags: dict[str, str | int | None] = {}
    for name in ("partition", "account", "qos", "constraint"):
        if (value := getattr(cluster, name)) is not None:
            flags[name] = value
    flags["nodes"] = cluster.nodes if is_run else 1
    flags["ntasks-per-node"] = 1
    if is_run and cluster.gpus:
        gpus = str(cluster.gpus)
        flags["gpus-per-node"] = f"{cluster.gpu_type}:{gpus}" if cluster.gpu_type else gpus
    if cluster.cpus is not None:
        flags["cpus-per-task"] = cluster.cpus
    if cluster.memory is not None:
        flags["mem"] = cluster.memory
    flags["time"] = cluster_config.time_limit(cluster)
    if is_run and cluster.exclusive:
        flags["exclusive"] = None
    for flag, value in cluster.extra.items():
        name = flag.lstrip("-")
        if value is False:
            continue
        if name in flags:
            reason = "has its own cluster key"
            raise InputError(f"cluster.extra.{flag}", value, reason, fix=f"the cluster key for --{name}")
        flags[name] = None if value is True or value is None else value
    return flags


def _without_double_blanks(text: str) -> str:
    lines: list[str] = []
    for line in text.split("\n"):
        if line.strip() or (lines and lines[-1].strip()):
            lines.append(line.rstrip())
    return "\n".join(lines).rstrip() + "\n"


_ADAPT = "Adapt the directives to your cluster; an option on sbatch's command line wins over them."
_CPUS = "On a cluster without GPUs give --export=ALL,PROCESSES_PER_NODE=2."
_MADE = "Made from slurm/templates; `optbench submit` makes one that fits your run and your cluster."
_EXAMPLE_CLUSTER = ClusterConfig(name="example", gpus=0, cpus=8, time="4h")
EXAMPLES: dict[Kind, Job] = {
    "train": Job(
        name="optbench",
        about=(
            "One run on one or several nodes; it resumes by itself after preemption and at the time limit:",
            "",
            "  sbatch --nodes=2 --gpus-per-node=8 --cpus-per-task=96 \\",
            "      slurm/train.sbatch model=llama_60m optimizer=sumo steps=10000",
            "",
            "The task of a node starts a process for each GPU: give it 12 CPUs a GPU, or all of the node.",
            f"Everything after the file's name goes to the run unchanged. {_ADAPT}",
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
            'A row: {"words": ["optimizer=sumo", "seed=1", "steps=1000"]}. Finished rows end immediately.',
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


def example_texts() -> dict[str, str]:
    """Return file name → text of all example scripts, as the templates render them for a plain cluster."""
    return {
        f"{kind}.sbatch": render(kind, job, _EXAMPLE_CLUSTER, by_hand=True) for kind, job in EXAMPLES.items()
    }


def main() -> int:
    """Write the example scripts next to the folder of the templates."""
    for name, text in example_texts().items():
        (template_root().parent / name).write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
