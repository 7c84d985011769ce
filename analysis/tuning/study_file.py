"""configs/study/NAME.yaml: optimizers, trials, spaces and keys of a tuning study, as words of the command line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness.config import sources, yaml_files
from harness.config.typed_keys import format_value
from harness.errors import InputError

GROUP = "study"
NUMBERS = ("trials", "seeds", "seed", "extend")
KNOWN = ("optimizers", *NUMBERS, "space", "run")


def words(name: str, given: Sequence[str]) -> list[str]:
    """The words of a study, and after them those of the command line, which win.

    ``optimizers`` is a list, replaced as a whole by optimizers on the command line; ``space`` maps options (``lr``,
    ``sumo.rank``) to lists or ranges; ``run`` maps keys of a run, or ``OPTIMIZER.key``, to values.

    Args:
        name: of the file.
        given: words of the command line, without ``study=``.

    Raises:
        InputError: no such study, no YAML, or a key that a study does not have.
    """
    path = sources.find(GROUP, name)
    if path is None:
        shown = sources.options(GROUP)
        raise InputError(GROUP, name, allowed=shown, fix=f"study={shown[0]}" if shown else None)
    content = _read(path)
    own = {word.partition("=")[0].removeprefix("optimizer.") for word in given if "=" in word}
    labels = [word for word in given if "=" not in word and not word.startswith("-")]
    found = [] if labels else [str(label) for label in content.get("optimizers", ())]
    pairs = {key: content[key] for key in NUMBERS if key in content}
    pairs |= {**content.get("run", {}), **content.get("space", {})}
    found += [f"{key}={_text(value)}" for key, value in pairs.items() if key not in own]
    return [*found, *given]


def _read(path: Path) -> dict[str, Any]:
    content = yaml_files.read(GROUP, path)
    if not isinstance(content, dict):
        raise InputError(GROUP, path, "holds no keys", allowed=KNOWN)
    for key, value in content.items():
        if key not in KNOWN:
            raise InputError(f"{GROUP} {path.stem}", str(key), "is an unknown key", allowed=KNOWN)
        kind = list if key == "optimizers" else dict if key in ("space", "run") else int
        if not isinstance(value, kind):
            allowed = {list: "a list", dict: "key: value lines", int: "a whole number"}[kind]
            raise InputError(f"{key} in {path}", value, allowed=allowed)
    return content


def _text(value: Any) -> str:
    """A value as a word has it: of a list the tuned values, of a list in a list one value that is a list."""
    return ",".join(map(format_value, value)) if isinstance(value, list) else format_value(value)
