"""The arguments of `optbench sweep`, checked. Torch-free.

They are those of `optbench compare`; a value that is several (a list or a range) is an option to tune.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from analysis.compare.arguments import ComparisonPlan, plan, verbosity
from analysis.formatting import listing
from analysis.tuning import space
from analysis.tuning.space import Axis
from harness import command_line
from harness.config import sources, yaml_files
from harness.config.typed_keys import format_value
from harness.errors import InputError
from harness.redaction import redact_argv
from optimizers import presets

DEFAULT_TRIALS = 5
MOST_TRIALS = 1000
DEFAULT_EXTEND = 2
"""More trials if a best one is on the edge of the default ladder; an explicit space is not extended."""
GROUP = "study"
NUMBERS = ("trials", "seeds", "seed", "extend")
TUNE_BY = ("loss", "metric")
KNOWN = ("optimizers", *NUMBERS, "tune_by", "space", "run")
_OWN = ("trials", "extend", "seed", "seeds", "tune_by", "study")


@dataclass(frozen=True)
class Study:
    """A tuning study and the comparison at its end.

    Attributes:
        plan: of the comparison: arms without tuned options, fresh seeds, shared overrides, group.
        trials: number of settings for every optimizer.
        seed: of the trials; the comparison uses other seeds.
        extend: most additional trials for every optimizer, one at a time, while a best one is on an edge.
        spaces: label → tuned options; an empty space is the default ladder of learning rates.
        tune_by: ``loss`` or ``metric``: what selects the best setting.
        dry_run: print the plan only.
    """

    plan: ComparisonPlan
    trials: int
    seed: int
    extend: int
    spaces: dict[str, tuple[Axis, ...]]
    tune_by: str
    dry_run: bool

    @property
    def trials_group(self) -> str:
        """Group of the trials, whose folder is separate from the comparison's."""
        return f"{self.plan.group}-trials"


def read(argv: Sequence[str]) -> Study:
    """Parse the arguments of ``optbench sweep``.

    Raises:
        InputError: an argument that `optbench compare` refuses, a space whose number of settings differs from the
            others, an option that is both fixed and tuned, or several values of a key that is not tunable.
    """
    arguments = command_line.parse("sweep", argv)
    options, words = arguments.options, expanded(arguments.rest)
    labels = [word for word in words if "=" not in word]
    own = {key: _whole(words, key) for key in ("trials", "extend", "seed")}
    shared, tuned = _spaces(labels, [word for word in words if word.partition("=")[0] not in _OWN])
    seed = own["seed"] or 0
    seeds = [f"seeds={value}" for value in _values(words, "seeds")]
    fresh = [f"seed={seed + 1}"] if labels else []
    comparison = plan([*shared, *seeds, *fresh], "sweep")
    spaces = {label: tuple(tuned.get(label, {}).values()) for label in labels}
    trials = own["trials"] or _natural(spaces.values())
    for label, axes in spaces.items():
        if axes:
            space.points(label, axes, trials, seed)
    command = shlex.join(["optbench", "sweep", *redact_argv(arguments.rest)])
    return Study(
        plan=replace(comparison, command=command, as_json=options.json, verbosity=verbosity(options)),
        trials=trials,
        seed=seed,
        extend=_extend(own["extend"], spaces),
        spaces=spaces,
        tune_by=_tune_by(words),
        dry_run=options.dry_run,
    )


def expanded(words: Sequence[str]) -> list[str]:
    """Return the words with those of the study file in place of ``study=NAME``.

    Raises:
        InputError: as `read_study_file`.
    """
    for name in _values(words, "study"):
        words = read_study_file(name, [word for word in words if not word.startswith("study=")])
    return list(words)


def _values(words: Sequence[str], key: str) -> list[str]:
    """Return the values of one of our own keys, equal ones once.

    Raises:
        InputError: two values.
    """
    values = list(dict.fromkeys(word.partition("=")[2] for word in words if word.partition("=")[0] == key))
    if len(values) > 1:
        raise InputError(key, values[1], f"was already set to {values[0]}")
    return values


def _tune_by(words: Sequence[str]) -> str:
    """Return what selects the best setting.

    Raises:
        InputError: neither of `TUNE_BY`.
    """
    for value in _values(words, "tune_by"):
        if value not in TUNE_BY:
            raise InputError("tune_by", value or "nothing", allowed=TUNE_BY, fix="tune_by=loss")
        return value
    return "loss"


_LIMITS = {"trials": (2, MOST_TRIALS), "extend": (0, 20), "seed": (0, 2**63 - 1 - MOST_TRIALS)}


def _whole(words: Sequence[str], key: str) -> int | None:
    """Return the whole number of one of our own keys; None if it is not set.

    Raises:
        InputError: not a whole number, or out of bounds.
    """
    low, high = _LIMITS[key]
    for text in _values(words, key):
        value = int(text) if text.isdecimal() else -1
        if not low <= value <= high:
            fix = "optbench compare runs each optimizer once" if key == "trials" and value == 1 else None
            raise InputError(key, text or "nothing", allowed=f"a whole number from {low} to {high}", fix=fix)
        return value
    return None


def _spaces(labels: Sequence[str], words: Sequence[str]) -> tuple[list[str], dict[str, dict[str, Axis]]]:
    """Split overrides into those of the comparison, and label → option → axis.

    An optimizer's own axis takes precedence over the one for all optimizers.

    Raises:
        InputError: several values of a key that is not tunable, or an option that is both fixed and tuned.
    """
    kept: list[str] = []
    for_all: dict[str, Axis] = {}
    tuned: dict[str, dict[str, Axis]] = {label: {} for label in labels}
    fixed: dict[str, dict[str, str]] = {label: {} for label in labels}
    fixed_for_all: dict[str, str] = {}
    for word in words:
        key, equals, text = word.partition("=")
        head, _, option = key.removeprefix("+").rpartition(".")
        is_own, is_shared = head in tuned, head == "optimizer" or (not head and option in presets.OPTIONS)
        axis = space.parse(key, option, text) if equals and (is_own or is_shared) else None
        if axis is not None:
            place = tuned[head] if is_own else for_all
            if place.get(option, axis) != axis:
                raise InputError(key, text, "was already set to other values")
            place[option] = axis
        elif head == "optimizer" and option not in ("name", "target"):
            if fixed_for_all.get(option, text) != text:
                raise InputError(key, text, f"was already set to {fixed_for_all[option]}")
            fixed_for_all[option] = text
        else:
            kept.append(word)
            if is_own:
                fixed[head][option] = text
            elif equals and head not in presets.names():
                _refuse_several(key, text)
    for label in labels:
        fixed[label] = fixed_for_all | fixed[label]
        tuned[label] = for_all | tuned[label]
        for option in tuned[label]:
            if option in fixed[label]:
                value = fixed[label][option]
                raise InputError(
                    f"{label}.{option}", value, "is both fixed and tuned", fix="remove one of them"
                )
        kept += [
            f"{label}.{option}={text}"
            for option, text in fixed_for_all.items()
            if fixed[label][option] == text
        ]
    return list(dict.fromkeys(kept)), tuned


def _refuse_several(key: str, text: str) -> None:
    if len(space.listed(text)) > 1:
        allowed = "one value; options of optimizers can be tuned: lr=1e-4,3e-4 or sumo.rank=16,32"
        fix = f"{key}={text.split(',')[0]}, or {key}=[{text}] where a list is meant"
        raise InputError(
            key, text, "has several values, but is not an option of an optimizer", allowed=allowed, fix=fix
        )


def _natural(spaces: Iterable[Sequence[Axis]]) -> int:
    """Return the default number of trials: the length of the longest list, if there is one."""
    sizes = [len(axes[0].values) for axes in spaces if len(axes) == 1 and axes[0].values]
    return max(sizes, default=DEFAULT_TRIALS)


def _extend(value: int | None, spaces: dict[str, tuple[Axis, ...]]) -> int:
    is_ladder = all(not axes or [axis.key for axis in axes] == ["lr"] for axes in spaces.values())
    if value and not is_ladder:
        other = next(
            label for label, axes in spaces.items() if axes and [axis.key for axis in axes] != ["lr"]
        )
        reason = f"extends learning rates only, and {other} has another space"
        raise InputError(
            "extend", value, reason, fix="extend=0, and a wider space where the best is on an edge"
        )
    if value is not None:
        return value
    return 0 if any(spaces.values()) else DEFAULT_EXTEND


def read_study_file(name: str, overrides: Sequence[str]) -> list[str]:
    """Return the arguments in a study file, followed by those of the command line, which take precedence.

    ``optimizers`` is a list, replaced as a whole by optimizers on the command line, which leaves out what the file says
    of the others; ``space`` maps options (``lr``, ``sumo.rank``) to lists or ranges; ``run`` maps keys of a run, or
    ``OPTIMIZER.key``, to values.

    Args:
        name: of the file.
        overrides: arguments of the command line, without ``study=``.

    Raises:
        InputError: no such study, invalid YAML, or an unknown key.
    """
    path = sources.find(GROUP, name)
    if path is None:
        shown = sources.options(GROUP)
        raise InputError(GROUP, name, allowed=shown, fix=f"study={shown[0]}" if shown else None)
    content = _load_yaml(path)
    own = {word.partition("=")[0].removeprefix("optimizer.") for word in overrides if "=" in word}
    labels = [word for word in overrides if "=" not in word and not word.startswith("-")]
    arguments = [] if labels else [str(label) for label in content.get("optimizers", ())]
    pairs = {key: content[key] for key in (*NUMBERS, "tune_by") if key in content}
    pairs |= {**content.get("run", {}), **content.get("space", {})}
    absent = {str(label) for label in content.get("optimizers", ())} - set(labels) if labels else set()
    arguments += [
        f"{key}={_value(value)}"
        for key, value in pairs.items()
        if key not in own and str(key).partition(".")[0] not in absent
    ]
    return [*arguments, *overrides]


def _load_yaml(path: Path) -> dict[str, Any]:
    content = yaml_files.read(GROUP, path)
    if not isinstance(content, dict):
        raise InputError(GROUP, path, "holds no keys", allowed=KNOWN)
    for key, value in content.items():
        if key not in KNOWN:
            raise InputError(f"{GROUP} {path.stem}", str(key), "is an unknown key", allowed=KNOWN)
        kind = {"optimizers": list, "space": dict, "run": dict, "tune_by": str}.get(key, int)
        if not isinstance(value, kind):
            allowed = {
                list: "a list",
                dict: "key: value lines",
                str: listing(TUNE_BY, "or"),
                int: "a whole number",
            }[kind]
            raise InputError(f"{key} in {path}", value, allowed=allowed)
    return content


def _value(value: Any) -> str:
    """Format a value: the items of a list are tuned values, a list in a list is one value."""
    return ",".join(map(format_value, value)) if isinstance(value, list) else format_value(value)
