"""``optbench train FILE.yaml``: the keys of a run in a file, such as a run's config.yaml or config.diff.yaml.

A file holds the keys of the command line, nested or dotted. A group with a plain value chooses (``optimizer: sumo``),
as does the ``name`` in a nested group; the other values are set on top, before those of the command line.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from harness.config import yaml_files
from harness.config.overrides import leaves
from harness.config.sources import GROUPS, find
from harness.config.suggestions import is_run_file
from harness.errors import InputError


class RunFile(NamedTuple):
    """What a file says.

    Attributes:
        path: of the file.
        choices: group → option.
        values: dotted key → value.
        texts: dotted key → scalar as written.
    """

    path: Path
    choices: dict[str, str]
    values: dict[str, Any]
    texts: dict[str, str]

    @property
    def is_recorded(self) -> bool:
        """Return True for the config.yaml of a run, which holds what the checks filled in."""
        return self.values.get("optimizer.lr_source") is not None

    @property
    def is_whole_model(self) -> bool:
        """Return True if the file describes a model completely, so that no preset's configuration is below it."""
        return "model.model_type" in self.values

    def without(self, groups: Sequence[str]) -> RunFile:
        """Return the file without its choices and values of some groups."""
        kept = {key: value for key, value in self.values.items() if key.partition(".")[0] not in groups}
        choices = {group: option for group, option in self.choices.items() if group not in groups}
        return self._replace(choices=choices, values=kept)


def split(words: Sequence[str]) -> tuple[RunFile | None, list[str]]:
    """Return the file that is among the words of a command line, read, and the other words.

    Raises:
        InputError: two files, or one that cannot be read.
    """
    before = ["", *words]
    # The word after a flag is its value: `--config my.yaml` is answered in words.
    files = [word for flag, word in zip(before, words) if is_run_file(word) and not flag.startswith("-")]
    if len(files) > 1:
        both = " and ".join(files)
        raise InputError("file", both, "are two files for one run", fix=f"optbench train {files[0]}")
    return (read(Path(files[0]).expanduser()) if files else None), [
        word for word in words if word not in files
    ]


def read(path: Path) -> RunFile:
    """Read the keys of a run from a YAML file.

    Raises:
        InputError: no such file, no YAML, no mapping, or a key given in two ways.
    """
    content = yaml_files.read("file", path)
    if not isinstance(content, dict) or not content:
        raise InputError("file", path, "holds no keys", fix="lines such as 'steps: 100'")
    choices = _defaults(path, content.pop("defaults", []))
    values: dict[str, Any] = {}
    for name, value in content.items():
        if name in GROUPS and not isinstance(value, dict):
            if value is not None:
                choices[str(name)] = str(value)
            continue
        if name in GROUPS and isinstance(value, dict):
            option = value.get("name")
            if isinstance(option, str) and find(str(name), option) is not None:
                choices[str(name)] = option
        for key, leaf in leaves(str(name), value).items():
            if key in values:
                raise InputError(
                    key, leaf, f"is given twice in {yaml_files.at(path, key)}", fix="keep one of them"
                )
            values[key] = leaf
    places = yaml_files.places(path)
    texts = {key: place.text for key, place in places.items() if place.text is not None}
    file = RunFile(path, choices, values, texts)
    # A run's config.yaml is complete: what a preset holds today is not merged below it.
    return file._replace(choices={}) if file.is_recorded else file


def _defaults(path: Path, entries: Any) -> dict[str, str]:
    """Choices of a defaults list, as experiments have one: ``- override /model: llama_9m``."""
    choices: dict[str, str] = {}
    for entry in entries if isinstance(entries, list) else [entries]:
        if entry == "_self_":
            continue
        pair = next(iter(entry.items())) if isinstance(entry, dict) and len(entry) == 1 else None
        group = str(pair[0]).removeprefix("override").strip().lstrip("/") if pair else ""
        if pair is None or group not in GROUPS:
            where = yaml_files.at(path, "defaults")
            fix = "entries such as '- override /model: llama_9m'"
            raise InputError("defaults", entry, f"in {where} chooses no group", allowed=GROUPS, fix=fix)
        if pair[1] is not None:
            choices[group] = str(pair[1])
    return choices
