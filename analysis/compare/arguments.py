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

MOST_SIDE_BY_SIDE = 64
DEFAULT_SEEDS = 3
"""Two seeds give a test with one degree of freedom; three are the fewest that can detect a large difference."""


@dataclass(frozen=True)
class ArmSpec:
    """The label of an arm, and the overrides that set its optimizer and options."""

    label: str
    overrides: tuple[str, ...]


@dataclass(frozen=True)
class ComparisonPlan:
    """The runs of a comparison."""

    arms: list[ArmSpec]
    seeds: list[int]
    shared: list[str]
    """Overrides of all runs."""
    group: str
    command: str
    """Command line that repeats the comparison."""
    as_json: bool
    verbosity: Verbosity = Verbosity.NORMAL
    concurrency: int = 1
    """Runs that train side by side on this machine."""

    def overrides(self, arm: ArmSpec, seed: int) -> list[str]:
        """Return the overrides of one run."""
        own = [f"seed={seed}", f"group={self.group}", f"name={arm.label}-seed{seed}"]
        return [*self.shared, *arm.overrides, *own]


def plan(argv: Sequence[str], command: str = "compare") -> ComparisonPlan:
    """Parse the arguments of ``optbench compare``, or of another ``command`` with the same grammar.

    ``NAME`` is an arm; ``seeds=N`` runs the seeds ``seed``, ``seed`` + 1, …; ``concurrency=N`` trains N runs side by
    side on this machine; ``NAME.key=value`` sets an optimizer option for that arm only (``NAME.name=PRESET`` or
    ``NAME.target=import.path`` makes NAME a label);
    ``preset=NAME`` is ``experiment=NAME``; everything else applies to all runs.

    Raises:
        InputError: no arm, an unknown or repeated arm, or a key that must differ between runs.
    """
    arguments = command_line.parse(command, argv)
    labels = arguments.names
    if not labels:
        arguments_text = " ".join(argv) or "nothing"
        fix = f"optbench {command} adamw sumo"
        raise InputError(command, arguments_text, "names no optimizer", allowed=presets.names(), fix=fix)
    for label in labels:
        if labels.count(label) > 1:
            fix = "once each; for two settings of one optimizer: a.name=sumo a.rank=32 b.name=sumo b.rank=64"
            raise InputError(command, label, "is named twice", fix=fix)
    own: dict[str, dict[str, str]] = {label: {} for label in labels}
    shared: list[str] = []
    own_keys: dict[str, str] = {}
    for override in arguments.overrides:
        key, _, value = override.partition("=")
        label, _, option = key.partition(".")
        if option and label in own:
            own[label][option] = value
        elif key in ("seeds", "seed", "group", "concurrency"):
            if own_keys.get(key, value) != value:
                raise InputError(key, value, f"was already set to {own_keys[key]}")
            own_keys[key] = value
        else:
            shared.append(_shared_override(key.removeprefix("+"), override, labels, command))
    return ComparisonPlan(
        arms=[_arm(label, own[label], command) for label in labels],
        seeds=_seeds(own_keys),
        shared=shared,
        group=own_keys.get("group") or f"{command}-{datetime.now():%Y%m%d-%H%M%S}",
        command=shlex.join(["optbench", command, *redact_argv(arguments.rest)]),
        as_json=arguments.options.json,
        verbosity=verbosity(arguments.options),
        concurrency=_concurrency(own_keys.get("concurrency", "1")),
    )


def verbosity(options: Namespace) -> Verbosity:
    """Return how much to print, from the options ``--quiet`` and ``--verbose``.

    Raises:
        InputError: both.
    """
    if options.quiet and options.verbose:
        raise InputError("--quiet", "--verbose", "contradict each other", fix="one of them")
    return Verbosity.QUIET if options.quiet else Verbosity.VERBOSE if options.verbose else Verbosity.NORMAL


def _shared_override(key: str, override: str, labels: Sequence[str], command: str) -> str:
    if key == "name":
        raise InputError(
            "name", override, "would be the same for all runs", fix="group=… names the comparison"
        )
    if key in ("optimizer", "optimizer.name", "optimizer.target"):
        value = override.partition("=")[2]
        fix = f"optbench {command} {labels[0]} {value}"
        raise InputError(key, value, "would be the same for all runs", fix=fix)
    if key == "preset":
        return f"experiment={override.partition('=')[2]}"
    head, _, option = key.partition(".")
    if option and head in presets.names():
        raise InputError(
            key,
            override.partition("=")[2],
            f"belongs to {head}, which is not compared",
            allowed=[f"{label}.{option}" for label in labels],
            fix=f"optbench {command} {head} …",
        )
    return override


def _arm(label: str, options: Mapping[str, str], command: str) -> ArmSpec:
    name = options.get("name", label)
    if "target" in options:
        overrides = [f"optimizer.name={name}", f"optimizer.target={options['target']}"]
    elif name in presets.names():
        overrides = [f"optimizer={name}"]
    else:
        key = command if name == label else f"{label}.name"
        fix = closest(name, presets.names()) or f"{label}.target=your.module.Optimizer"
        raise InputError(key, name, "is not an optimizer", allowed=presets.names(), fix=fix)
    rest = [f"optimizer.{key}={value}" for key, value in options.items() if key not in ("name", "target")]
    return ArmSpec(label, (*overrides, *rest))


def _concurrency(text: str) -> int:
    value = int(text) if text.isdecimal() else 0
    if not 1 <= value <= MOST_SIDE_BY_SIDE:
        allowed = f"runs side by side: 1 to {MOST_SIDE_BY_SIDE}"
        raise InputError("concurrency", text or "nothing", allowed=allowed, fix="concurrency=2")
    return value


def refuse_concurrency(plan: ComparisonPlan) -> None:
    """Refuse runs side by side where jobs of a cluster train them.

    Raises:
        InputError: ``concurrency`` is set.
    """
    if plan.concurrency > 1:
        reason = "is for runs on this machine: jobs of an array run side by side by themselves"
        raise InputError("concurrency", plan.concurrency, reason, fix="cluster.throttle=8 limits the jobs")


def _seeds(values: Mapping[str, str]) -> list[int]:
    try:
        first = int(values.get("seed", "0"))
    except ValueError:
        first = -1
    if first < 0:
        raise InputError("seed", values.get("seed"), allowed="a whole number from 0 on", fix="seed=0")
    try:
        count = int(values.get("seeds", str(DEFAULT_SEEDS)))
    except ValueError:
        count = 0
    if not 1 <= count <= 1000:
        raise InputError("seeds", values.get("seeds"), allowed="how many seeds: 1 to 1000", fix="seeds=3")
    return list(range(first, first + count))
