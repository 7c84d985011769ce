"""What `optbench margin` and `optbench reconstruct` share: the grammar of their keys, and the mirror in W&B.

Nothing here imports torch or wandb before a mirror starts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from harness.config import sources, yaml_files
from harness.config.errors import InputError


def bracketed(argument: str) -> str:
    """Return `w=2,-0.5` as `w=[2,-0.5]`, which is what Hydra's grammar calls a list."""
    key, equals, value = argument.partition("=")
    is_list = equals and "," in value and value[0] not in "[{'\"("
    return f"{key}=[{value}]" if is_list else argument


def experiment(name: str, command: str) -> dict[str, Any]:
    """Return the values of configs/experiment/NAME.yaml.

    Args:
        name: of the file.
        command: whose keys it should hold; shipped files for it begin with this name.

    Raises:
        InputError: no such file, no YAML, or keys of a training run.
    """
    path = sources.find("experiment", name)
    if path is None:
        shipped = [option for option in sources.options("experiment") if option.startswith(command)]
        fix = f"experiment={shipped[0]}" if shipped else None
        raise InputError("experiment", name, allowed=shipped, fix=fix)
    content = yaml_files.read("experiment", path)
    if not isinstance(content, dict):
        raise InputError("experiment", path, "holds no keys")
    if "defaults" in content:
        raise InputError("experiment", name, "is for optbench train", fix=f"optbench train experiment={name}")
    return content


def help_lines(rows: Iterable[tuple[str, Any, str]]) -> str:
    """Return (key, default, meaning) of every key, one a line, for `--help`."""
    lines = ["keys (default; meaning); a list is [a,b] or a,b:"]
    lines += [f"  {key}={_value_text(default)}  {meaning}".rstrip() for key, default, meaning in rows]
    return "\n".join([*lines, "  OPTIMIZER.option=…  options of an optimizer: optbench show NAME"])


def _value_text(value: Any) -> str:
    if isinstance(value, list | tuple):
        return f"[{','.join(map(_value_text, value))}]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value)


def mirror(
    *,
    job_type: str,
    wandb: Mapping[str, Any],
    group: str,
    run_id: str,
    folder: Path,
    keys: Mapping[str, Any],
    rows: Iterable[Mapping[str, Any]],
    summary: Mapping[str, Any],
    exit_code: int,
    say: Callable[[str], None],
    facts: Mapping[str, Any] | None = None,
    attach: Callable[[Any], object] | None = None,
) -> None:
    """Log a finished job to W&B; if that fails, the folder has everything already.

    Args:
        job_type: of the W&B run.
        wandb: the keys `wandb.*`; nothing is logged with mode=disabled.
        group: of the W&B run.
        run_id: of the W&B run.
        folder: of the job, where an offline run is written.
        keys: what the job was asked for, as config of the W&B run.
        rows: figures in the order of their `step`.
        summary: figures of the whole job.
        exit_code: of the command.
        say: takes lines for people.
        facts: further entries of the W&B config.
        attach: logs tables, images and artifacts to the W&B run that it is given.
    """
    if wandb["mode"] == "disabled":
        return
    from harness.config.schema import RunConfig
    from harness.record.wandb import WandbSink

    config = RunConfig.model_validate({"wandb": dict(wandb), "group": group})
    sink = WandbSink(config, folder, run_id, dict(facts or {}), say, job_type=job_type, described=dict(keys))
    for row in rows:
        sink.write(dict(row))
    if attach is not None:
        sink.attach(attach)
    sink.finish(summary, exit_code)
