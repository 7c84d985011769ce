"""What `optbench compare` and `optbench report` were told, checked word by word. Torch-free."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from analysis.training.progress import Verbosity
from harness.config.errors import InputError, closest
from harness.redaction import redact_argv
from optimizers import presets

DEFAULT_SEEDS = 3
"""Two seeds give a test with one degree of freedom; three are the fewest that show a difference of some
size.
"""
PROGRESS_FLAGS = {
    "-q": Verbosity.QUIET,
    "--quiet": Verbosity.QUIET,
    "-v": Verbosity.VERBOSE,
    "--verbose": Verbosity.VERBOSE,
}
"""How much a command that trains prints before its result."""


@dataclass(frozen=True)
class Arm:
    """A label and the words that choose its optimizer and options."""

    label: str
    overrides: tuple[str, ...]


@dataclass(frozen=True)
class Plan:
    """Which runs a comparison consists of."""

    arms: list[Arm]
    seeds: list[int]
    shared: list[str]
    """Words that all runs get."""
    group: str
    command: str
    """Command line that reproduces it."""
    as_json: bool
    verbosity: Verbosity = Verbosity.NORMAL

    def overrides(self, arm: Arm, seed: int) -> list[str]:
        """The words of one run."""
        own = [f"seed={seed}", f"group={self.group}", f"name={arm.label}-seed{seed}"]
        return [*self.shared, *arm.overrides, *own]


@dataclass(frozen=True)
class Request:
    """What `optbench report` was asked for."""

    folder: Path
    """The runs; with ``export`` they are written there first."""
    out: Path
    as_json: bool
    figures: bool = False
    """Write each plot as a PNG, too."""
    wandb: bool = False
    """Build the dashboards in W&B."""
    project: tuple[str | None, str] | None = None
    """W&B entity (None: one's own) and project for them; None: what the runs name."""
    export: tuple[str, str, str | None] | None = None
    """W&B entity, project and group (None: all) to read runs from."""


def plan(argv: Sequence[str], command: str = "compare") -> Plan:
    """Read the words after ``optbench compare`` (or those of another ``command`` with the same grammar).

    ``NAME`` is an arm; ``seeds=N`` runs the seeds ``seed``, ``seed`` + 1, …; ``NAME.key=value`` sets an
    optimizer option for that arm only (``NAME.name=PRESET`` or ``NAME.target=import.path`` makes NAME a label
    of your own); ``preset=NAME`` is ``experiment=NAME``; all else goes to every run.

    Raises:
        InputError: no arm, an arm named twice or unknown, a word that is neither, keys that each run gets for
        itself.
    """
    labels = [word for word in argv if "=" not in word and not word.startswith("-")]
    _check_flags(argv, {"--json", *PROGRESS_FLAGS})
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
    for word in (word for word in argv if "=" in word and not word.startswith("-")):
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
    return Plan(
        arms=[_arm(label, own[label], command) for label in labels],
        seeds=_seeds(given),
        shared=shared,
        group=given.get("group") or f"{command}-{datetime.now():%Y%m%d-%H%M%S}",
        command=shlex.join(
            ["optbench", command, *redact_argv(word for word in argv if not word.startswith("-"))]
        ),
        as_json="--json" in argv,
        verbosity=verbosity(argv),
    )


def verbosity(argv: Sequence[str]) -> Verbosity:
    """Read ``--quiet`` and ``--verbose`` among the words.

    Raises:
        InputError: both.
    """
    wanted = dict.fromkeys(PROGRESS_FLAGS[word] for word in argv if word in PROGRESS_FLAGS)
    if len(wanted) > 1:
        raise InputError("--quiet", "--verbose", "contradict each other", fix="one of them")
    return next(iter(wanted), Verbosity.NORMAL)


def report(argv: Sequence[str]) -> Request:
    """Read the words after ``optbench report``.

    Raises:
        InputError: no folder, more than one, an unknown flag, or a W&B project that is not ENTITY/PROJECT.
    """
    words: list[str] = []
    values: dict[str, str] = {}
    rest = iter(argv)
    for word in rest:
        flag, _, value = word.partition("=")
        if flag in _TAKE_FOLDER:
            values[flag] = value or next(rest, "")
            if not values[flag] or values[flag].startswith("--"):
                raise InputError(flag, "nothing", "needs a folder", fix=_USAGE[flag])
        elif flag == "--wandb":
            values[flag] = value
        elif flag == "--figures":
            values[flag] = value or next(rest, "")
            if values[flag] != "png":
                raise InputError(flag, values[flag] or "nothing", allowed=["png"], fix="--figures png")
        elif word != "--json":
            words.append(word)
    _check_flags(words, {"--json", "--wandb", "--figures", *_TAKE_FOLDER})
    source, given = values.get("--export"), values.get("--wandb")
    if source is not None:
        words, given = [*words, *([given] if given else [])], None
    if len(words) != 1:
        shown = " ".join(words) or "nothing"
        what = "is not one W&B project" if source is not None else "is not one folder"
        raise InputError(
            "report",
            shown,
            what,
            allowed="DIR [--out DIR] [--figures png] [--wandb] [--json]; ENTITY/PROJECT[/GROUP] --export DIR [--json]",
            fix=_USAGE["--export"] if source is not None else "optbench report runs",
        )
    folder = Path(words[0] if source is None else source)
    return Request(
        folder=folder,
        out=Path(values.get("--out", folder)),
        as_json="--json" in argv,
        figures="--figures" in values,
        wandb="--wandb" in values and source is None,
        project=_project(given) if given else None,
        export=_place(words[0]) if source is not None else None,
    )


_TAKE_FOLDER = ("--out", "--export")
_USAGE = {
    "--out": "optbench report runs/GROUP --out FOLDER",
    "--export": "optbench report ENTITY/PROJECT/GROUP --export FOLDER",
}


def _project(words: str) -> tuple[str | None, str]:
    parts = words.split("/")
    if len(parts) > 2 or not all(parts):
        raise InputError("--wandb", words, allowed="PROJECT or ENTITY/PROJECT", fix="--wandb=ENTITY/PROJECT")
    return (parts[0] if len(parts) == 2 else None), parts[-1]


def _place(words: str) -> tuple[str, str, str | None]:
    entity, project, group = [*words.split("/", 2), "", ""][:3]
    if not entity or not project or (words.count("/") > 1 and not group):
        raise InputError(
            "--export", words, allowed="ENTITY/PROJECT or ENTITY/PROJECT/GROUP", fix=_USAGE["--export"]
        )
    return entity, project, group or None


def _check_flags(words: Sequence[str], known: set[str]) -> None:
    for word in words:
        if word.startswith("-") and word not in known:
            stem = word.lstrip("-")
            fix = stem if "=" in stem else None
            raise InputError("argument", word, "is not known", allowed=sorted(known), fix=fix)


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


def _arm(label: str, options: Mapping[str, str], command: str) -> Arm:
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
    return Arm(label, (*words, *rest))


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
