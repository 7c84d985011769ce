"""What a job asks of a SLURM cluster: the ``cluster`` group, its keys and their checks. Torch-free.

It says where a run happens, not what the run is: no key of it is part of a run's configuration or identity.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from pydantic import Field

from harness.config import sources, value_formats
from harness.config.overrides import leaves, parse
from harness.config.typed_keys import Key, TypedKeys, format_value, keys_of, unknown, validate
from harness.errors import InputError, closest
from harness.redaction import REDACTED, is_secret_name, secret_in

GROUP = "cluster"
DEFAULT = "generic_gpu"
_RESERVED = ("output", "error", "array", "requeue", "no-requeue", "open-mode", "signal", "ntasks", "job-name")
_RESERVED += ("ntasks-per-node", "dependency", "chdir", "parsable", "wrap", "wait")
"""Flags of sbatch that the scripts rely on."""
_BIDI = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
"""Overrides of the writing direction: what a terminal shows is then not what is in the file."""


class PreflightConfig(TypedKeys):
    """A look at the nodes before training; it names the one that is not as it should be."""

    enabled: bool = True
    """On jobs of several nodes."""
    seconds: float = Field(default=10.0, gt=0)
    """Length of the all-reduce."""
    min_gb_per_s: float = Field(default=0.1, ge=0)
    """Least throughput of that all-reduce per node, GB/s (ring convention); 0: measured and shown only. The default is
    a 1 Gb/s network; give your cluster's."""
    min_share: float = Field(default=0.5, ge=0, le=1)
    """Least throughput of a GPU's all-reduce and of a node's best pair, as a share of the best that was measured: a
    broken rail of the network is slower than the others; 0: not checked."""
    min_free_gb: float = Field(default=1.0, ge=0)
    """Least free disk, GB: the run's folder and each node's temporary folder."""
    max_skew_s: float = Field(default=2.0, gt=0)
    """Most that a node's clock may differ from the nodes' median, seconds."""
    timeout_s: float = Field(default=120.0, gt=0)
    """A node that has not answered by then is bad, seconds."""


class ClusterConfig(TypedKeys):
    """Resources and habits of a SLURM cluster."""

    name: str = DEFAULT
    """Preset (a file of configs/cluster/), or a name of your own."""
    partition: str | None = None
    """null: the cluster's default."""
    account: str | None = None
    """That the time is charged to."""
    qos: str | None = None
    """Quality of service."""
    constraint: str | None = None
    """Node features, e.g. a100&ib. Runs that are compared by speed need the same GPUs."""
    nodes: int = Field(default=1, ge=1)
    """Machines of one run."""
    gpus: int = Field(default=1, ge=0)
    """Per node; 0: none, the run is on CPUs."""
    gpu_type: str | None = None
    """As the cluster calls it, e.g. h100."""
    processes: int | None = Field(default=None, ge=1)
    """Training processes per node; null: one per GPU, or one."""
    cpus: int | None = Field(default=None, ge=1)
    """Per node; null: the cluster's default."""
    memory: str | None = None
    """Per node, as SLURM writes it, e.g. 64G; 0: all of it. null: the cluster's default."""
    time: str = "4h"
    """Longest time until a job is stopped and queued again: seconds, 90m, 2h30m or 1-12:00:00."""
    exclusive: bool = False
    """Whole nodes."""
    grace_s: int = Field(default=120, ge=1, le=65535)
    """Seconds before the time limit at which a run is asked to save: time to save + 60, as SLURM may be 60 s early."""
    max_restarts: int = Field(default=20, ge=0)
    """How often one job may be queued again, whatever the cause."""
    idle_attempts: int = Field(default=1, ge=1)
    """A job is not queued again after so many attempts in a row without a newer checkpoint."""
    throttle: int | None = Field(default=None, ge=1)
    """Runs of a grid that may be running at the same time; null: as many as the cluster lets."""
    python: str | None = None
    """Interpreter on the nodes; null: this one, or python where there is a container."""
    container: list[str] = Field(default_factory=list)
    """Words before the interpreter that start a container, e.g. [apptainer,exec,--nv,image.sif]."""
    srun: list[str] = Field(default_factory=list)
    """More flags of srun, e.g. ['--container-image=image.sqsh'] for pyxis."""
    modules: list[str] = Field(default_factory=list)
    """Loaded with `module load`, in this order."""
    setup: list[str] = Field(default_factory=list)
    """Shell lines before everything else, one an entry."""
    env: dict[str, str] = Field(default_factory=dict)
    """Environment variables, e.g. NCCL_SOCKET_IFNAME. No secrets: the script is kept."""
    extra: dict[str, str | int | bool | None] = Field(default_factory=dict)
    """More flags of sbatch: {reservation: abc}, {no-kill: true}."""
    address_suffix: str | None = None
    """Appended to the first node's name for the address that processes meet at, e.g. -ib; null: the address that SLURM
    uses."""
    logs: str | None = None
    """Folder of the jobs' output; null: slurm/logs in the run's folder."""
    exclude_bad_nodes: bool = False
    """Submit again without the nodes that the preflight found bad."""
    preflight: PreflightConfig = Field(default_factory=PreflightConfig)

    @property
    def processes_per_node(self) -> int:
        """Return the number of training processes on each node."""
        return self.processes or max(1, self.gpus)

    @property
    def world_size(self) -> int:
        """Return the number of training processes of one run."""
        return self.nodes * self.processes_per_node


class _Described(TypedKeys):
    cluster: ClusterConfig


def known() -> Mapping[str, Key]:
    """Return every ``cluster.…`` key."""
    return keys_of(_Described)


def split(overrides: Iterable[str]) -> tuple[list[str], list[str]]:
    """Split overrides into those of the cluster and all others, each in their order."""
    mine: list[str] = []
    others: list[str] = []
    for override in overrides:
        key = override.partition("=")[0].lstrip("+")
        is_mine = "=" in override and (key == GROUP or key.startswith(f"{GROUP}."))
        (mine if is_mine else others).append(override)
    return mine, others


def load(overrides: Sequence[str]) -> ClusterConfig:
    """Compose and check the cluster.

    Args:
        overrides: ``cluster=NAME`` and ``cluster.key=value``, in any order.

    Raises:
        InputError: an option, key or value that is not known, or two that cannot go together.
    """
    assignments = parse(overrides, lambda argument, following: None)
    option = next((a.text for a in assignments if a.key == GROUP and not isinstance(a.value, dict)), DEFAULT)
    if sources.find(GROUP, option) is None:
        choices = sources.options(GROUP)
        guess = closest(option, choices) or DEFAULT
        raise InputError(GROUP, option, allowed=choices, fix=f"{GROUP}={guess}")
    values = sources.compose_one(GROUP, option)
    source = str(sources.find(GROUP, option))
    schema = known()
    for key, value in leaves(GROUP, values).items():
        _check_known(key, value, schema, source)
    texts: dict[str, str] = {}
    for assignment in assignments:
        if assignment.key == GROUP and not isinstance(assignment.value, dict):
            continue
        for key, value in leaves(assignment.key, assignment.value).items():
            _check_known(key, value, schema, None)
            _set(values, key.split(".")[1:], value)
        texts[assignment.key] = assignment.text
    nested = _with_text_environment({GROUP: values})
    described = validate(_Described, nested, texts, source=lambda key: None if texts else source)
    return _checked(described.cluster)


def time_limit(config: ClusterConfig) -> str:
    """Return `ClusterConfig.time` as sbatch takes it, D-HH:MM:SS."""
    seconds = value_formats.duration_seconds(f"{GROUP}.time", config.time)
    assert seconds is not None
    minutes, second = divmod(round(seconds), 60)
    return f"{minutes // 1440}-{minutes // 60 % 24:02d}:{minutes % 60:02d}:{second:02d}"


def _checked(config: ClusterConfig) -> ClusterConfig:
    seconds = value_formats.duration_seconds(f"{GROUP}.time", config.time)
    if seconds is not None and seconds < config.grace_s:
        reason = f"is not longer than cluster.grace_s = {config.grace_s}: the run would save at once"
        raise InputError(f"{GROUP}.time", config.time, reason, fix=f"{GROUP}.time={2 * config.grace_s}s")
    if config.gpu_type is not None and config.gpus == 0:
        raise InputError(f"{GROUP}.gpu_type", config.gpu_type, "without GPUs", fix=f"{GROUP}.gpus=1")
    if config.processes is not None and 0 < config.gpus < config.processes:
        reason = f"is more than cluster.gpus = {config.gpus}: one process needs one GPU"
        allowed = f"at most {config.gpus}, or any number with cluster.gpus=0"
        fix = f"cluster.processes={config.gpus}"
        raise InputError(f"{GROUP}.processes", config.processes, reason, allowed=allowed, fix=fix)
    for flag, value in config.extra.items():
        _check_flag(flag, value)
    for name in config.env:
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise InputError(
                f"{GROUP}.env",
                ascii(name),
                "is not the name of an environment variable",
                fix="letters, digits and _",
            )
        if is_secret_name(name):
            raise _open(f"{GROUP}.env", name)
    for key, text in _texts(GROUP, config.model_dump()):
        check_text(key, text)
        check_open(key, text)
    return config


def check_text(key: str, text: str) -> None:
    """Refuse characters that leave the line of a script that a value is written to, or hide what is in it.

    Args:
        key: configuration key or name of the value, for the message.
        text: the value.

    Raises:
        InputError: it holds a control character, a line or paragraph separator, an override of the writing direction
            or half of a surrogate pair.
    """
    if any(unicodedata.category(letter) in ("Cc", "Zl", "Zp", "Cs") or letter in _BIDI for letter in text):
        reason = "holds a line break or a control character, which no batch script may"
        raise InputError(key, ascii(text), reason, allowed="printable characters", fix=f"{key}=… in one line")


def check_open(key: str, text: str) -> None:
    """Refuse a secret in a value that is written to a script.

    Raises:
        InputError: its name or its form shows a secret; the message does not repeat it.
    """
    name = secret_in(text)
    if name is not None:
        raise _open(key, name)


def _open(key: str, name: str) -> InputError:
    reason = "would be in the script, which is kept and readable"
    variable = name.rpartition(".")[2]
    variable = variable if variable.isidentifier() else "NAME"
    return InputError(
        key, f"{name}={REDACTED}", reason, fix=f"export {variable} in your shell: jobs inherit it"
    )


def _check_flag(flag: str, value: object) -> None:
    """Refuse what is not an sbatch flag, or one that the scripts rely on, also abbreviated as sbatch allows."""
    name = flag.lstrip("-")
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9-]*", name):
        raise InputError(
            f"{GROUP}.extra", ascii(flag), "is not an sbatch flag", allowed="letters, digits and -"
        )
    if any(reserved.startswith(name) for reserved in _RESERVED):
        reason = "is decided by the script"
        raise InputError(f"{GROUP}.extra.{flag}", value, reason, fix=f"remove {GROUP}.extra.{flag}")


def _texts(key: str, value: Any) -> Iterator[tuple[str, str]]:
    """Yield (key, text) of every text below a value; the entries of a list are one text, too."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, dict):
        for name, inner in value.items():
            yield key, str(name)
            yield from _texts(f"{key}.{name}", inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _texts(key, inner)
        yield key, " ".join(map(str, value))


def _check_known(key: str, value: Any, schema: Mapping[str, Key], source: str | None) -> None:
    if key in schema or any(key.startswith(f"{name}.") and schema[name].default == {} for name in schema):
        return
    if any(name.startswith(f"{key}.") for name in schema):
        return  # a group given as a value: the validation says so
    raise unknown(key, value, list(schema), source)


def _set(values: dict[str, Any], path: Sequence[str], value: Any) -> None:
    *parents, last = path
    for parent in parents:
        inside = values.get(parent)
        if not isinstance(inside, dict):
            inside = values[parent] = {}
        values = inside
    values[last] = value


def _with_text_environment(values: dict[str, Any]) -> dict[str, Any]:
    """Make the values of environment variables text, whatever YAML takes them for."""
    env = values[GROUP].get("env")
    if isinstance(env, dict):
        values[GROUP]["env"] = {str(name): format_value(value) for name, value in env.items()}
    return values
