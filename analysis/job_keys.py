"""Keys of companion jobs: lists without brackets, experiment files, and the text of `--help`. Torch-free."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from harness.config import sources, yaml_files
from harness.config.errors import InputError


def bracketed(word: str) -> str:
    """`w=2,-0.5` as `w=[2,-0.5]`, which is what Hydra's grammar calls a list."""
    key, equals, text = word.partition("=")
    is_list = equals and "," in text and text[0] not in "[{'\"("
    return f"{key}=[{text}]" if is_list else word


def experiment(name: str, command: str) -> dict[str, Any]:
    """Values of configs/experiment/NAME.yaml.

    Args:
        name: of the file.
        command: whose keys it should hold; shipped files for it begin with this word.

    Raises:
        InputError: no such file, no YAML, or keys of a training run.
    """
    path = sources.find("experiment", name)
    if path is None:
        ours = [option for option in sources.options("experiment") if option.startswith(command)]
        raise InputError("experiment", name, allowed=ours, fix=f"experiment={ours[0]}" if ours else None)
    content = yaml_files.read("experiment", path)
    if not isinstance(content, dict):
        raise InputError("experiment", path, "holds no keys")
    if "defaults" in content:
        raise InputError("experiment", name, "is for optbench train", fix=f"optbench train experiment={name}")
    return content


def listed(rows: Iterable[tuple[str, Any, str]]) -> str:
    """(key, default, meaning) of every key, one a line, for `--help`."""
    lines = ["keys (default; meaning); a list is [a,b] or a,b:"]
    lines += [f"  {key}={_word(default)}  {meaning}".rstrip() for key, default, meaning in rows]
    return "\n".join([*lines, "  OPTIMIZER.option=…  options of an optimizer: optbench show NAME"])


def _word(value: Any) -> str:
    if isinstance(value, list | tuple):
        return f"[{','.join(map(_word, value))}]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value)
