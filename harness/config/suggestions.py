"""Suggest what to type for a key or value of another program, or a value in another notation. No torch.

`aliases` holds the tables. A suggestion is what to type: one or more arguments of a command.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from harness.config import aliases, sources
from harness.errors import closest

RUN_FILES = (".yaml", ".yml")

_SUFFIXES = {
    **dict.fromkeys(("", "steps", "step", "tokens", "s"), 1),
    **dict.fromkeys(("k", "thousand"), 10**3),
    **dict.fromkeys(("m", "mio", "million"), 10**6),
    **dict.fromkeys(("b", "g", "bn", "billion"), 10**9),
    **dict.fromkeys(("t", "trillion"), 10**12),
    **{f"{letter}i": 2**power for letter, power in zip("kmg", (10, 20, 30))},
    "%": 0.01,
}
_POWERS_OF_TWO = (
    "seq_len",
    "vocab_size",
    "hidden_size",
    "batch_size",
    "micro_batch_size",
    "intermediate_size",
)
"""Last parts of keys whose "4k" is 4096."""
_NUMBER = re.compile(
    r"(?P<base>[+-]?(?:\d{1,18}\.?\d{0,18}|\.\d{1,18})(?:e[+-]?\d{1,3})?)"
    r"(?:(?:\^|\*\*)(?P<power>\d{1,2}))?(?P<suffix>%|[a-z]*)"
)
_UNQUOTED = re.compile(r"[\w./:*?@%+-]*")
_PLAIN_LIST = re.compile(r"\[[\w./:@%+,-]*\]")


def is_run_file(argument: str) -> bool:
    """Return True if an argument names a YAML file of keys."""
    if argument.startswith("-") or not argument.lower().endswith(RUN_FILES):
        return False
    return "=" not in argument or _exists(argument)


def assign(key: str, value: Any) -> str:
    """Return ``key=value`` as a shell wants it, in quotes where Hydra's grammar needs them."""
    text = str(value)
    if _UNQUOTED.fullmatch(text) or _PLAIN_LIST.fullmatch(text):
        return f"{key}={text}"
    inside = text.replace("\\", "\\\\").replace('"', '\\"')
    return shlex.quote(f"{key}={text}" if text.startswith(("[", "{")) else f'{key}="{inside}"')


def special(name: str, value: str | None, known: Iterable[str]) -> str | None:
    """Return what to type for a name that is not a key here, or whose value decides; else None.

    Args:
        name: key as typed, without dashes.
        value: as typed; None: none was typed.
        known: keys that exist.
    """
    leaf = _folded(name.rpartition(".")[2])
    if leaf in ("help", "h"):
        return "optbench train --help"
    if leaf in ("multirun", "sweep"):
        return "optbench sweep OPTIMIZER …"
    if leaf == "dry_run":
        return "optbench plan …"
    if leaf in aliases.COUNTED:
        return aliases.COUNTED[leaf]
    if leaf in aliases.SWITCHES and (value is None or of_switch(value) != "false"):
        return aliases.SWITCHES[leaf]
    if value is None:
        return None
    if leaf in ("zero_stage", "zero", "stage", "deepspeed_stage") and value in ("0", "1", "2", "3"):
        return f"engine=zero{value}"
    if leaf in aliases.CONFIGS and "." not in name and is_run_file(value):
        return f"optbench train {shlex.quote(value)}"
    if leaf in aliases.CONFIGS and value in sources.experiments("train"):
        return f"experiment={value}"
    if leaf in aliases.RESUMES or (leaf == "resume" and run_of(value)):
        return run_of(value) or "resume=true"
    if leaf == "dataset" and "." not in name:
        return option("data", value) or (f"data={value}" if value in sources.options("data") else None)
    return None


def alias(name: str, value: str | None, known: Iterable[str]) -> str | None:
    """Return what to type for a key of another program, or None.

    Args:
        name: key as typed, without dashes.
        value: as typed; None: none was typed.
        known: keys and groups that exist.
    """
    target = aliases.KEYS.get(_folded(name)) or aliases.KEYS.get(_folded(name.rpartition(".")[2]))
    if target is None or target == name or target not in (*known, *sources.GROUPS):
        return None
    if value is None:
        return f"{target}=…"
    if target in sources.GROUPS:
        return option(target, value) or assign(target, value)
    return assign(target, of_choice(target, value) or value)


def option(group: str, value: str) -> str | None:
    """Return the overrides that choose what ``group=value`` means, or None.

    Args:
        group: of the configuration.
        value: a name of another program, a file, a folder or a name on a hub.
    """
    choices = sources.options_of_runs(group)
    if is_run_file(value):
        stem = Path(value).stem
        return f"{group}={stem}" if stem in choices else f"optbench train {shlex.quote(value)}"
    kind = aliases.FILES.get(_suffix(value))
    if group == "data" and kind in choices:
        return f"data={kind} {assign('data.files', value)}"
    if group == "engine" and value.endswith(".json"):
        return f"engine=zero2 {assign('engine.config_file', value)}"
    if group == "optimizer" and value.endswith(".py"):
        return f"optimizer={Path(value).stem}.CLASS optimizer.lr=0.001"
    near = aliases.OPTIONS.get(group, {}).get(_folded(value))
    if near is None:
        near = next((name for name in choices if _folded(name) == _folded(value)), None)
    if near in choices:
        return f"{group}={near}"
    if near is not None and near.startswith("torch."):
        return f"{group}={near} optimizer.lr=0.001"
    is_place = _is_folder(value) or value.startswith((".", "/", "~"))
    if group == "model" and ("/" in value or is_place):
        return assign("model.path", value)
    if group == "data" and is_place:
        return f"data=text {assign('data.files', value.rstrip('/') + '/*.txt')}"
    if group == "data" and re.fullmatch(r"[\w.-]+/[\w.-]+", value):
        return f"data.source=datasets data.dataset={value}"
    guess = closest(value, choices)
    return f"{group}={guess}" if guess else None


def of_choice(name: str, value: str) -> str | None:
    """Return the value that another program's value is called under this key, or None."""
    table = aliases.VALUES.get(name, {})
    return table.get(_folded(value)) or table.get(value.lower())


def of_switch(value: str) -> str | None:
    """Return "true" or "false" for a text that means one of them, or None."""
    text = value.strip().lower()
    return text if text in ("true", "false") else aliases.SWITCH_VALUES.get(text)


def is_nothing(value: str) -> bool:
    """Return True for a text that other programs write for null."""
    return value.strip().lower() in aliases.NOTHING


def number(name: str, text: str, *, whole: bool) -> str | None:
    """Return a number written in another notation (10k, 1M, 1,000, 2^20, 5 %, 0,001) in ours, or None.

    Args:
        name: key, which decides whether 4k is 4000 or 4096.
        text: as typed.
        whole: a whole number is wanted.
    """
    if len(text) > 40:
        return None
    plain = re.sub(r"[\s_'\"]", "", text.lower().replace("−", "-"))
    for times in ("×10^", "*10^", "x10^", "·10^", "*10**"):
        plain = plain.replace(times, "e")
    if re.fullmatch(r"[+-]?[1-9]\d{0,2}(,\d{3})+(\.\d+)?[a-z]*", plain):
        plain = plain.replace(",", "")
    elif re.fullmatch(r"[+-]?\d+,\d+", plain) and not whole:
        plain = plain.replace(",", ".")
    match = _NUMBER.fullmatch(plain)
    factor = _SUFFIXES.get(match["suffix"]) if match else None
    if match is None or factor is None:
        return None
    is_power = re.fullmatch(r"1|2|4|8|16|32|64|128|256|512", match["base"]) is not None
    if match["suffix"] == "k" and is_power and name.rpartition(".")[2] in _POWERS_OF_TWO:
        factor = 1024
    try:
        value = float(match["base"]) ** int(match["power"] or 1) * factor
    except OverflowError:
        return None
    if not whole:
        return f"{value:.12g}"
    return str(round(value)) if abs(value) < 1e18 and abs(value - round(value)) < 1e-6 else None


def run_of(value: str) -> str | None:
    """Return the command that goes on with the run whose folder or checkpoint is named; None: it names neither."""
    if "/" not in value and not _is_folder(value):
        return None
    parts = Path(value).parts
    run = Path(*parts[: parts.index("checkpoints")]) if "checkpoints" in parts[1:] else Path(value)
    return f"optbench train {shlex.quote(str(run))}/config.yaml"


def _exists(value: str) -> bool:
    try:
        return Path(value).is_file()
    except OSError:
        return False


def _is_folder(value: str) -> bool:
    try:
        return Path(value).is_dir()
    except OSError:
        return False


def _suffix(value: str) -> str:
    names = Path(value.rstrip("]")).suffixes
    while names and names[-1].lower() in aliases.COMPRESSED:
        names.pop()
    return names[-1].lower() if names else ""


def _folded(text: str) -> str:
    return text.strip().lower().replace("-", "_")
