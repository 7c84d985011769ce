"""Batch scripts out of the templates in slurm/templates/. Torch-free."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jinja2

from harness import import_path
from harness.config import cluster as cluster_config
from harness.config.cluster import ClusterConfig
from harness.config.errors import InputError

Kind = Literal["train", "sweep", "analysis"]


@dataclass(frozen=True)
class Job:
    """What one script is to do.

    Attributes:
        name: of the job, in SLURM's listings.
        about: comment lines at the top.
        output: file of the job's output, in SLURM's notation (``%j``).
        folder: that the job starts in; None: the one that it is submitted from.
        words: of the run or the command; None: what follows the script on sbatch's command line.
        run: folder of the run (train).
        grid: file of the grid (sweep); None: as for ``words``.
        array: rows of the grid that are to be run, as sbatch takes them (sweep).
        script: where this script will lie, for submitting it again.
        successors, dependents: files of job numbers: those submitted in this one's place, those that wait for it.
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
    """Folder of the templates: inside the package in a wheel, beside it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    inside = package / "slurm" / "templates"
    return inside if inside.is_dir() else package.parent / "slurm" / "templates"


def render(kind: Kind, job: Job, cluster: ClusterConfig, *, by_hand: bool = False) -> str:
    """The script.

    Args:
        kind: which template.
        job: what it does.
        cluster: what it asks for.
        by_hand: an example for people to adapt: processes are counted on the node, and ``python`` is whichever comes
            first there.

    Raises:
        InputError: a value that must not be in a script: it would leave its line, or it is a secret.
    """
    _check(job)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(template_root()),
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
    template = environment.get_template(f"{kind}.sbatch.j2")
    text = template.render(job=job, cluster=_facts(kind, cluster, by_hand=by_hand))
    return _without_double_blanks(text)


def array_of(rows: Iterable[int], throttle: int | None) -> str:
    """Rows as sbatch's --array takes them: ``0-2,5%4``.

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
    """A file of a job's output: ``pattern`` is SLURM's, a % of the folder is not."""
    return f"{str(folder).replace('%', '%%')}/{pattern}"


def check_words(words: Iterable[str]) -> None:
    """Refuse words of a run or a command that no script may hold.

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


def _facts(kind: Kind, cluster: ClusterConfig, *, by_hand: bool) -> dict[str, Any]:
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
        "exclude_bad_nodes": cluster.exclude_bad_nodes,
        "preflight": {
            "enabled": preflight.enabled and (by_hand or cluster.nodes > 1),
            "flags": [
                f"--gpus={-1 if by_hand else cluster.gpus}",
                f"--seconds={preflight.seconds:g}",
                f"--min-gb-per-s={preflight.min_gb_per_s:g}",
                f"--min-free-gb={preflight.min_free_gb:g}",
                f"--max-skew-s={preflight.max_skew_s:g}",
                f"--timeout-s={preflight.timeout_s:g}",
            ],
        },
    }


def _flags(kind: Kind, cluster: ClusterConfig) -> dict[str, str | int | None]:
    """Directives, in a fixed order. An analysis takes one node and no GPUs."""
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
            reason = "is a key of its own"
            raise InputError(
                f"cluster.extra.{flag}", value, reason, fix=f"the cluster key that stands for --{name}"
            )
        flags[name] = None if value is True or value is None else value
    return flags


def _without_double_blanks(text: str) -> str:
    lines: list[str] = []
    for line in text.split("\n"):
        if line.strip() or (lines and lines[-1].strip()):
            lines.append(line.rstrip())
    return "\n".join(lines).rstrip() + "\n"
