"""The arguments of `optbench compare`: which runs the comparison consists of. Torch-free."""

from __future__ import annotations

import shlex
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from analysis.compare.progress import Verbosity
from harness import command_line
from harness.errors import InputError, closest
from harness.redaction import redact_argv
from optimizers import presets

DEFAULT_SEEDS = 3
"""Two seeds give a test with one degree of freedom; three are the fewest that show a difference of some
size.
"""


@dataclass(frozen=True)
class ArmSpec:
    """A label and the words that choose its optimizer and options."""

    label: str
    overrides: tuple[str, ...]


@dataclass(frozen=True)
class ComparisonPlan:
    """Which runs a comparison consists of."""

    arms: list[ArmSpec]
    seeds: list[int]
    shared: list[str]
    """Words that all runs get."""
    group: str
    command: str
    """Command line that reproduces it."""
    as_json: bool
    verbosity: Verbosity = Verbosity.NORMAL

    def overrides(self, arm: ArmSpec, seed: int) -> list[str]:
        """The words of one run."""
        own = [f"seed={seed}", f"group={self.group}", f"name={arm.label}-seed{seed}"]
        return [*self.shared, *arm.overrides, *own]


def plan(argv: Sequence[str], command: str = "compare") -> ComparisonPlan:
    """Read the words after ``optbench compare`` (or those of another ``command`` with the same grammar).

    ``NAME`` is an arm; ``seeds=N`` runs the seeds ``seed``, ``seed`` + 1, …; ``NAME.key=value`` sets an
    optimizer option for that arm only (``NAME.name=PRESET`` or ``NAME.target=import.path`` makes NAME a label
    of your own); ``preset=NAME`` is ``experiment=NAME``; all else goes to every run.

    Raises:
        InputError: no arm, an arm named twice or unknown, a word that is neither, keys that each run gets for
        itself.
    """
    arguments = command_line.parse(command, argv)
    labels = arguments.names
    if not labels:
        said = " ".join(argv) or "nothing"
        fix = f"optbench {command} adamw sumo"
        raise InputError(command, said, "names no optimizer", allowed=presets.names(), fix=fix)
    for label in labels:
        if labels.count(label) > 1:
            fix = "once each; for two settings of one optimizer: a.name=sumo a.rank=32 b.name=sumo b.rank=64"
            raise InputError(command, label, "is named twice", fix=fix)
    own: dict[str, dict[str, str]] = {label: {} for label in labels}
    shared: list[str] = []
    given: dict[str, str] = {}
    for word in arguments.overrides:
        key, _, value = word.partition("=")
        label, _, option = key.partition(".")
        if option and label in own:
            own[label][option] = value
        elif key in ("seeds", "seed", "group"):
            if given.get(key, value) != value:
                raise InputError(key, value, f"was given as {given[key]} before")
            given[key] = value
        else:
            shared.append(_shared(key.removeprefix("+"), word, labels, command))
    return ComparisonPlan(
        arms=[_arm(label, own[label], command) for label in labels],
        seeds=_seeds(given),
        shared=shared,
        group=given.get("group") or f"{command}-{datetime.now():%Y%m%d-%H%M%S}",
        command=shlex.join(["optbench", command, *redact_argv(arguments.rest)]),
        as_json=arguments.options.json,
        verbosity=verbosity(arguments.options),
    )


def verbosity(options: Namespace) -> Verbosity:
    """Return how much to print, from the options ``--quiet`` and ``--verbose``.

    Raises:
        InputError: both.
    """
    if options.quiet and options.verbose:
        raise InputError("--quiet", "--verbose", "contradict each other", fix="one of them")
    return Verbosity.QUIET if options.quiet else Verbosity.VERBOSE if options.verbose else Verbosity.NORMAL


def _shared(key: str, word: str, labels: Sequence[str], command: str) -> str:
    if key == "name":
        raise InputError("name", word, "would be the same for all runs", fix="group=… names the comparison")
    if key in ("optimizer", "optimizer.name", "optimizer.target"):
        value = word.partition("=")[2]
        fix = f"optbench {command} {labels[0]} {value}"
        raise InputError(key, value, "would be the same for all runs", fix=fix)
    if key == "preset":
        return f"experiment={word.partition('=')[2]}"
    head, _, option = key.partition(".")
    if option and head in presets.names():
        raise InputError(
            key,
            word.partition("=")[2],
            f"belongs to {head}, which is not compared",
            allowed=[f"{label}.{option}" for label in labels],
            fix=f"optbench {command} {head} …",
        )
    return word


def _arm(label: str, options: Mapping[str, str], command: str) -> ArmSpec:
    name = options.get("name", label)
    if "target" in options:
        words = [f"optimizer.name={name}", f"optimizer.target={options['target']}"]
    elif name in presets.names():
        words = [f"optimizer={name}"]
    else:
        key = command if name == label else f"{label}.name"
        fix = closest(name, presets.names()) or f"{label}.target=your.module.Optimizer"
        raise InputError(key, name, "is not an optimizer", allowed=presets.names(), fix=fix)
    rest = [f"optimizer.{key}={value}" for key, value in options.items() if key not in ("name", "target")]
    return ArmSpec(label, (*words, *rest))


def _seeds(given: Mapping[str, str]) -> list[int]:
    try:
        first = int(given.get("seed", "0"))
    except ValueError:
        first = -1
    if first < 0:
        raise InputError("seed", given.get("seed"), allowed="a whole number from 0 on", fix="seed=0")
    try:
        count = int(given.get("seeds", str(DEFAULT_SEEDS)))
    except ValueError:
        count = 0
    if not 1 <= count <= 1000:
        raise InputError("seeds", given.get("seeds"), allowed="how many seeds: 1 to 1000", fix="seeds=3")
    return list(range(first, first + count))
